"""Data-free training text, for launchers: `torchrun --nproc_per_node 2 scripts/generate_data.py --model MODEL`."""

import sys

from eqat_mm.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("generate-data", sys.argv[1:]))
