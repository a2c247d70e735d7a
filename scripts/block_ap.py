"""Block-AP, for launchers: `torchrun --nproc_per_node 8 scripts/block_ap.py --config RECIPE --model MODEL`."""

import sys

from eqat_mm.cli import script

if __name__ == "__main__":
    sys.exit(script("block-ap"))
