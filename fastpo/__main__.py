"""`python -m fastpo`, the same as the `fastpo` command."""

import os
import sys

from fastpo.cli import main

code = main()
if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
    # The other processes wait in a collective that this one will never join, and NCCL's threads would wait with them:
    # leave at once, so that torchrun sees the death and ends them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
