"""What a GPU says about this code within minutes: parts with a time box each, written as JSON after every part.

    python benchmarks/gpu_day.py                      all parts
    python benchmarks/gpu_day.py --only decode block-ap     some of them
    python benchmarks/gpu_day.py --dry                tiny sizes on the CPU: does the script itself run?

Nothing is read or downloaded: weights are random, shapes are those of a 7B and a 70B model. A part that fails says so
and the next one runs. Needs torch, triton, transformers and pytest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "demo", "eval", "kernels")]
os.environ["TRITON_INTERPRET"] = "1" if "--dry" in sys.argv else "0"  # Triton reads it when it is imported

import gpu_day_kernels  # noqa: E402
import gpu_day_models  # noqa: E402
import gpu_day_whole  # noqa: E402
import torch  # noqa: E402
from gpu_sizes import Sizes  # noqa: E402

Part = Callable[[Sizes], dict[str, Any]]
PARTS: dict[str, tuple[float, Part]] = (
    gpu_day_kernels.PARTS | gpu_day_models.PARTS | gpu_day_whole.PARTS | gpu_day_kernels.LAST
)
"""Seconds a part may take, and the part."""


def run(part: Part, sizes: Sizes) -> dict[str, Any]:
    """Return what a part says; whatever it raises is a result."""
    begun = time.monotonic()
    try:
        result = part(sizes)
    except Exception as error:  # noqa: BLE001 - the parts behind it count, too
        result = {"error": f"{type(error).__name__}: {error}"[:600], "where": traceback.format_exc()[-1500:]}
    gc.collect()
    sizes.empty_cache()
    return result | {"seconds": round(time.monotonic() - begun, 1)}


def main() -> None:
    """Run the parts that fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--seconds", type=float, default=600.0, help="no part begins that would end later")
    parser.add_argument("--output", type=Path, default=Path("gpu_day.json"), help="where the results go")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    sizes, results, begun = Sizes(arguments.dry), {}, time.monotonic()
    results["versions"] = {"torch": torch.__version__, "device": sizes.name}
    for name in arguments.only:
        box, part = PARTS[name]
        left = arguments.seconds - (time.monotonic() - begun)
        results[name] = run(part, sizes) if box <= left else {"skipped": f"{box:.0f} s do not fit into {left:.0f}"}
        arguments.output.write_text(json.dumps(results, indent=1))
        print(name, json.dumps(results[name]), flush=True)


if __name__ == "__main__":
    main()
