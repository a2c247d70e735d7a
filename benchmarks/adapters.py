"""Every adapter that ships, tried as a user would: the table of docs/adding_a_model.md.

    python benchmarks/adapters.py [NAME ...] [--folder FOLDER] [--write]

For each a tiny random model is saved in a folder with its tokenizer or processor, and commands are run on it: the
contract, `block-ap` on text, and with images whose tokens count by gradient, `e2e-qp` on text and on conversations (an
image, two images of different sizes, none, and all of these with several turns), `eval`, `generate` (with an image,
where it sees), and plain transformers in a process that cannot import this package. `--write` puts the table into the
document.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from eqat_mm.blocks.arch import Arch
from eqat_mm.checkpoint.read import load
from eqat_mm.cli import main as eqat
from eqat_mm.contract import outcomes
from llava_adapters import arch_for, known_archs
from llava_adapters.tiny_processor import WORDS, chat_template, word_tokenizer

DOCUMENT = Path(__file__).parents[1] / "docs/adding_a_model.md"
SHOWN = ("one image", "several images", "no image", "several turns")
COLUMNS = ("contract", "block-ap", "block-ap: images", "e2e-qp: text", *SHOWN, "eval", "generate", "transformers")
SPEC = ("--quant.bits", "4", "--quant.group_size", "32", "--quant.symmetric", "true")
TEXT = ("--data.length", "16", "--data.count", "8")
TRAINED = ("--max_steps", "1", "--batch_size", "2", "--accumulation", "2", "--learning_rate", "1e-3")

_READER = """
import importlib.util, sys, torch, transformers
assert importlib.util.find_spec("eqat_mm") is None
kind, folder, given = sys.argv[1:]
saved = torch.load(given)
model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(**saved["inputs"]).logits
error = (logits - saved["logits"]).norm() / saved["logits"].norm()
assert error < 1e-2, f"logits that differ by {error:.1e}"
"""


@dataclass
class Tried:
    """One adapter in its folder, and what became of each column so far: empty where all is well, or what is not."""

    arch: Arch
    folder: Path
    sees: bool
    found: dict[str, str]

    def attempt(self, column: str, work: Callable[[], object]) -> None:
        """Fill a column."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = work()
            self.found[column] = "" if not status else _last_words(said.getvalue())
        except Exception as error:  # noqa: BLE001 - whatever happens to a user
            self.found[column] = f"{type(error).__name__}: {error}"


def tried(arch: Arch, folder: Path) -> dict[str, str]:
    """Return what became of every column, for one adapter."""
    one = Tried(arch, folder, arch.processor is not None, {})
    alone = ("--text_only", "true") if arch.auto_class == "AutoModelForImageTextToText" else ()
    model, text, made = _saved(arch, folder), folder / "text.jsonl", folder / "block-ap"
    text.write_text("\n".join(json.dumps({"text": each}) for each in _documents()), encoding="utf-8")
    source = ("--data.source", str(text), *TEXT)
    one.attempt("contract", lambda: _contract(arch, folder / "contract"))
    calibration = [word.replace("--data.", "--calibration.") for word in source]
    fit = ("--fit.epochs", "1", "--fit.validation_samples", "0")
    block_ap = ["block-ap", str(model), *SPEC, *calibration, *fit]
    one.attempt("block-ap", lambda: eqat([*block_ap, "--output", str(made)]))
    if one.sees:
        one.attempt("block-ap: images", lambda: _with_images(folder, block_ap))
    packed = made / "model"
    tune = ["e2e-qp", str(model), "--quantized", str(packed), *SPEC, *TRAINED]
    one.attempt("e2e-qp: text", lambda: eqat([*tune, "--output", str(folder / "e2e"), *source, *alone]))
    for kind in SHOWN if one.sees else ():
        file = _conversations(folder, kind)
        words = [*tune, "--output", str(folder / kind.replace(" ", "-")), "--conversations.source", str(file)]
        one.attempt(kind, lambda words=words: eqat([*words, "--conversations.max_length", "256"]))
    one.attempt("eval", lambda: eqat(["eval", str(packed), "--reference", str(model), *source]))
    one.attempt("generate", lambda: _generate(one, packed))
    one.attempt("transformers", lambda: _read_elsewhere(arch, folder, packed))
    return one.found


def _with_images(folder: Path, block_ap: Sequence[str]) -> int:
    talks = _conversations(folder, "several turns")
    words = ["--conversations.source", str(talks), "--conversations.max_length", "256", "--token_weights", "gradient"]
    return eqat([*block_ap, "--output", str(folder / "with-images"), *words])


def _saved(arch: Arch, folder: Path) -> Path:
    made: tuple[Any, Any] = arch.tiny()
    made[0].save_pretrained(folder / "full")
    speaker = _speaker(arch) if arch.processor is None else arch.processor()
    speaker.save_pretrained(folder / "full")
    return folder / "full"


def _speaker(arch: Arch) -> Any:
    """Return a tokenizer of words; of characters for Qwen2, for which transformers reads any tokenizer as its own."""
    if arch.name == "qwen2":
        signs = ["<unk>", "<s>", "</s>", "<pad>", "\u0120", "\u010a", *string.ascii_letters, *string.digits, *"<>:"]
        vocabulary = {sign: number for number, sign in enumerate(signs)}
        special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
        tokenizer: Any = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], **special)
    else:
        tokenizer = word_tokenizer()
    tokenizer.chat_template = chat_template("<image>")
    return tokenizer


def _documents() -> Iterator[str]:
    draw = random.Random(0)
    return (" ".join(draw.choices(WORDS[2:40], k=60)) for _ in range(60))


def _contract(arch: Arch, folder: Path) -> None:
    for outcome in outcomes(arch, folder):
        if outcome.error is not None:
            raise outcome.error


def _conversations(folder: Path, kind: str) -> Path:
    """Write a file of conversations in LLaVA's format; return it."""
    from PIL import Image

    draw, records = random.Random(kind), []
    for number in range(8):
        images = {"one image": 1, "several images": 2, "no image": 0}.get(kind, number % 3)
        names = [f"{kind.replace(' ', '-')}-{number}-{place}.png" for place in range(images)]
        for name in names:
            size = (draw.randint(20, 60), draw.randint(20, 60))
            Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(folder / name)
        turns = 3 if kind == "several turns" else 1
        spoken = [
            {"from": speaker, "value": " ".join(draw.choices(WORDS[2:40], k=5))}
            for _ in range(turns)
            for speaker in ("human", "gpt")
        ]
        spoken[0]["value"] = "<image>\n" * images + spoken[0]["value"]
        records.append({"id": str(number), "conversations": spoken} | ({"image": names} if names else {}))
    file = folder / f"{kind.replace(' ', '-')}.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def _generate(one: Tried, packed: Path) -> int:
    words = ["generate", str(packed), "--prompt", "w5 w6", "--max_new_tokens", "4"]
    image = ["--image", str(one.folder / "one-image-0-0.png"), "--chat", "true"]
    return eqat(words) or (eqat([*words, *image]) if one.sees else 0)


@torch.no_grad()
def _read_elsewhere(arch: Arch, folder: Path, packed: Path) -> None:
    """Compare what this package predicts with what transformers does in a process without it."""
    made: tuple[Any, list[dict[str, Any]]] = arch.tiny()
    inputs = made[1][0]
    logits = load(packed).eval()(**inputs, use_cache=False).logits
    torch.save({"inputs": dict(inputs), "logits": logits}, folder / "given.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", _READER, arch.auto_class, str(packed), str(folder / "given.pt")]
    # A checkout that is installed in this interpreter is hidden by the finder that the first line removes.
    command[3] = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n" + _READER
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(_last_words(done.stderr))


def _last_words(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("where:", "given:"))]
    return "; ".join(told[-2:] or lines[-1:])


def row(name: str, found: dict[str, str]) -> str:
    """Return a row of the table."""
    marks = ("–" if column not in found else "no" if found[column] else "yes" for column in COLUMNS)
    return f"| `{name}` | {' | '.join(marks)} |"


def write(rows: Mapping[str, str]) -> None:
    """Put rows, by adapter, into the table of the document, in place of those that are there."""
    before = DOCUMENT.read_text(encoding="utf-8")
    old = re.search(r"\| adapter \| contract \|.*\n(\|.*\n)+", before)
    assert old is not None, DOCUMENT
    known = {found[1]: found[0] for found in re.finditer(r"\| `(\w+)` \|.*", old[0])}
    lines = [each for name in known_archs() if (each := (known | rows).get(name))]
    head = f"| adapter | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}"
    DOCUMENT.write_text(before.replace(old[0], "\n".join([head, *lines]) + "\n"), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Try adapters; print the table and what does not work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="adapters; all by default")
    parser.add_argument("--folder", type=Path, help="where models are put, and stay")
    parser.add_argument("--write", action="store_true", help="put the table into docs/adding_a_model.md")
    options = parser.parse_args(argv)
    rows: dict[str, str] = {}
    wrong = 0
    for name in options.names or known_archs():
        with contextlib.ExitStack() as stack:
            place = (
                options.folder / name if options.folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            )
            place.mkdir(parents=True, exist_ok=True)
            found = tried(arch_for(name), place)
        rows[name] = row(name, found)
        print(rows[name], flush=True)
        for column, said in found.items():
            if said:
                wrong += 1
                print(f"    {column}: {said}", flush=True)
    if options.write:
        write(rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
