"""E2E-QP, for launchers: `python scripts/e2e_qp.py --config RECIPE --model MODEL`."""

import sys

from eqat_mm.cli import script

if __name__ == "__main__":
    sys.exit(script("e2e-qp"))
