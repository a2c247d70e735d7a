"""Block-AP, as launchers start it: `python scripts/block_ap.py --config RECIPE --model MODEL`."""

import sys

from eqat_mm.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("block-ap", sys.argv[1:]))
