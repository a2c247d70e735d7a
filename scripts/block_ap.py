"""Block-AP, for launchers: `torchrun --nproc_per_node 8 scripts/block_ap.py --config RECIPE --model MODEL`."""

import sys

from eqat_mm.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("block-ap", sys.argv[1:]))
