"""The scripts that wrote the frozen numbers are imported by the tests, which make the same inputs."""

import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent.parent)
if FOLDER not in sys.path:
    sys.path.append(FOLDER)
