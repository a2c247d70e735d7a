"""E2E-QP, for launchers: `python scripts/e2e_qp.py --config RECIPE --model MODEL`."""

import sys

from eqat_mm.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("e2e-qp", sys.argv[1:]))
