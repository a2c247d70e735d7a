"""LLM-QAT, for launchers: `deepspeed scripts/llm_qat.py --config RECIPE --model MODEL --deepspeed zero-2`."""

import sys

from eqat_mm.cli import script

if __name__ == "__main__":
    sys.exit(script("llm-qat"))
