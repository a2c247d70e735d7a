"""Evaluation, for launchers: `torchrun --nproc_per_node 8 scripts/eval.py --model MODEL --tasks llava-1.5`."""

import sys

from eqat_mm.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("eval", sys.argv[1:]))
