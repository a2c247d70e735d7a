"""Every command that makes something, as small as it can be, and what it makes without the times."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from eqat_mm.commands.tables.ladder import LadderJob
from eqat_mm.commands.tables.llm_qat_table import LLMQATTableJob
from eqat_mm.commands.verbs.generate_data import GenerateDataJob
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.text.settings import TextWindows
from tests.commands.jobs import block_ap_job, e2e_qp_job, llm_qat_job, rtn_job
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import WORDS, Tiny, save_tiny

FOUR_OF_SIX: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "logging_steps": 2}
"""Steps that end within an epoch of six."""
_TIMES = ("started", "finished", "seconds", "continued", "tokens_per_second", "eta_seconds", "peak_bytes", "peak_ram")
_ENVIRONMENT = (
    "environment",
    "revision",
    "output",
    "proof",
    "sha256",
    "provenance",
    "versions",
    "overwrite",
    "plan",
    "source",
    "quantized",
)
_VOLATILE = {*_TIMES, *_ENVIRONMENT}


@dataclass(frozen=True)
class Place:
    """What the commands read.

    Attributes:
        folder: of all this.
        tiny: a Llama of two blocks and a text.
        base: a packed checkpoint of it.
        llava_base: a packed checkpoint of a tiny LLaVA.
        conversations: about drawn images.
    """

    folder: Path
    tiny: Tiny
    base: Path
    llava_base: Path
    conversations: Path


def make_place(folder: Path) -> Place:
    """Make what the commands read, in an empty folder."""
    tiny, llava = save_tiny(folder), folder / "tiny-llava"
    save_tiny_llava(llava)
    bases = [rtn(rtn_job(replace(tiny, folder=model), folder / f"{model.name}-rtn")) for model in (tiny.folder, llava)]
    return Place(folder, tiny, *bases, _save_conversations(folder / "conversations"))


def _save_conversations(folder: Path) -> Path:
    folder.mkdir()
    records = []
    for index in range(12):
        Image.new("RGB", (16, 16), (20 * index, 100, 200)).save(folder / f"{index}.png")
        words = WORDS[5 + index], WORDS[20 + index]
        turns = [{"from": "human", "value": f"<image>\n{words[0]}"}, {"from": "gpt", "value": words[1]}]
        records.append({"image": f"{index}.png", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def words_of(command: str, job: Any) -> list[str]:
    """The command line of a job, every setting spelled out."""
    return [command, *_flags(asdict(job), "--")]


def _flags(settings: dict[str, Any], prefix: str) -> list[str]:
    words = []
    for name, value in settings.items():
        if isinstance(value, dict):
            words += _flags(value, f"{prefix}{name}.")
        else:
            plain = value if isinstance(value, str) else json.dumps(value, default=str).strip('"')
            words.append(f"{prefix}{name}={plain}")
    return words


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
        name: of it.
        words: its command line, for an output folder or file.
        makes_file: its output is a file.
    """

    name: str
    words: Callable[[Place, Path], list[str]]
    makes_file: bool = False

    def output(self, folder: Path) -> Path:
        """Its output in a folder of its own."""
        return folder / ("texts.jsonl" if self.makes_file else "run")


def _block_ap(spool: str, commit: str) -> Case:
    def words(place: Place, output: Path) -> list[str]:
        return words_of("block-ap", block_ap_job(place.tiny, output, spool=spool, commit=commit))

    return Case(f"block-ap {spool} {commit}", words)


def _rtn(place: Place, output: Path) -> list[str]:
    return words_of("rtn", rtn_job(place.tiny, output))


def _e2e_qp(place: Place, output: Path, **changes: Any) -> list[str]:
    return words_of("e2e-qp", e2e_qp_job(place.tiny, place.base, output, **(FOUR_OF_SIX | changes)))


def _conversations(place: Place, output: Path) -> list[str]:
    changes: dict[str, Any] = {
        "conversations": ImageTextData(str(place.conversations)),
        "loss": "cross-entropy",
        "data": TextWindows(),
    }
    return _e2e_qp(replace(place, base=place.llava_base), output, batch_size=2, **changes)


def _llm_qat(place: Place, output: Path) -> list[str]:
    return words_of("llm-qat", llm_qat_job(place.tiny, output, **FOUR_OF_SIX))


def _generate_data(place: Place, output: Path) -> list[str]:
    sizes: dict[str, Any] = {"count": 6, "length": 12, "batch_size": 2, "device": "cpu"}
    return words_of("generate-data", GenerateDataJob(model=str(place.tiny.folder), output=output, **sizes))


def _demo(place: Place, output: Path) -> list[str]:
    tiny = place.tiny
    job = LadderJob(
        block_ap=block_ap_job(tiny, None),
        e2e_qp=e2e_qp_job(tiny, None, None, **FOUR_OF_SIX),
        e2e_qp_only=e2e_qp_job(tiny, None, None, max_steps=2),
        data=tiny.windows(4, held_out=True),
        precision="float32",
        output=output,
    )
    return words_of("demo", job)


def _table(place: Place, output: Path) -> list[str]:
    train = llm_qat_job(place.tiny, None, smooth_samples=4, **FOUR_OF_SIX)
    data = place.tiny.windows(4, held_out=True)
    return words_of("llm-qat-table", LLMQATTableJob(train=train, bits=("4-8-4",), data=data, output=output))


RTN, E2E_QP = Case("rtn", _rtn), Case("e2e-qp text", _e2e_qp)
CONVERSATIONS, LLM_QAT = Case("e2e-qp conversations", _conversations), Case("llm-qat", _llm_qat)
GENERATE_DATA = Case("generate-data", _generate_data, makes_file=True)
BLOCK_AP = {(spool, commit): _block_ap(spool, commit) for spool in ("ram", "disk") for commit in ("recompute", "files")}
SINGLE = [RTN, *BLOCK_AP.values(), E2E_QP, CONVERSATIONS, LLM_QAT, GENERATE_DATA]
LADDERS = [Case("demo", _demo), Case("llm-qat-table", _table)]


def outcome(folder: Path) -> dict[str, Any]:
    """All below a folder by its path in it: JSON without times and places, every other file byte for byte."""
    return {path.relative_to(folder).as_posix(): _content(path) for path in folder.rglob("*")}


def _content(path: Path) -> Any:
    if path.is_dir():
        return "folder"
    with suppress(ValueError):
        return _parsed(path)
    return path.read_bytes()


def _parsed(path: Path) -> Any:
    if path.name in ("run.json", "state.json", "eqat.json", "results.json", "result.json", "texts.jsonl.json"):
        return _steady(json.loads(path.read_text()))
    if path.name == "metrics.jsonl":
        records = map(json.loads, path.read_text().splitlines())
        return [_steady(record) for record in records if "train_runtime" not in record]
    return path.read_bytes()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _steady(each) for name, each in value.items() if name not in _VOLATILE}
    return [_steady(each) for each in value] if isinstance(value, list) else value
