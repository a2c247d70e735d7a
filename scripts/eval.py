"""Evaluation, for launchers: `torchrun --nproc_per_node 8 scripts/eval.py --model MODEL --tasks llava-1.5`."""

import sys

from eqat_mm.cli import script

if __name__ == "__main__":
    sys.exit(script("eval"))
