"""`python -m eqat_mm COMMAND`: the command line of eqat, for launchers that start a module."""

import sys

from eqat_mm.cli import main

if __name__ == "__main__":
    sys.exit(main())
