"""Data-free training text, for launchers: `torchrun --nproc_per_node 2 scripts/generate_data.py --model MODEL`."""

import sys

from eqat_mm.cli import script

if __name__ == "__main__":
    sys.exit(script("generate-data"))
