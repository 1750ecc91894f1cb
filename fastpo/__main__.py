"""`python -m fastpo`, the same as the `fastpo` command."""

import sys

from fastpo.cli import main

sys.exit(main())
