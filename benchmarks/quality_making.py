"""How `quality.py` makes the model of a row: by this project's commands, or by a peer's package in its environment.

All run as processes of their own, so that seconds and memory are theirs. What a method may see are the row's windows
and nothing else: Block-AP's validation samples and the text of E2E-QP are among them.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measured_command import measured
from peer_environments import PEERS, environment_of, pins_of
from quality_rows import LENGTH, METHODS, ROUNDING, Row
from safetensors.torch import save_file
from torch import Tensor

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.commands.verbs.evaluate import bits_per_weight
from eqat_mm.data.text.settings import TextSource, TextWindows
from eqat_mm.data.text.windows import digest_of, text_windows
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.runtime.sealed import read_sealed

OURS = ("ours", "ours-symmetric")
"""Methods that take the recipes of the model."""
FIRST_PHASE = 192
"""Windows that Block-AP of our recipes takes, however many there are."""
LONG_STEPS = {2: 600, 3: 500, 4: 400}
"""Of our longer E2E-QP, by bits, 4 windows each (its recipe)."""
VALIDATION = 16
"""Windows of Block-AP among those that it may see."""
SCRIPTS = 1
"""Raise it whenever a peer's script makes another model: its rows are then made anew."""
_OURS_ALONE = ("PYTHONPATH",)
"""Variables that a peer is not to inherit."""


class RowFailedError(Exception):
    """A method has made no model; says why."""


@dataclass(frozen=True)
class Source:
    """What all rows are made from.

    Attributes:
        model: as it is named on a command line.
        folder: of it.
        text: that methods see: its name, or several with weights, as a command line has them.
    """

    model: str
    folder: Path
    text: str

    def windows(self, count: int) -> Tensor:
        """Return the first windows, int64 [count, T]."""
        text = [TextSource(**each) for each in json.loads(self.text)] if self.text.startswith("[") else self.text
        return text_windows(load_tokenizer(self.folder), TextWindows(text, length=LENGTH, count=count))


def recipe_of(row: Row, source: Source) -> dict[str, Any]:
    """Return what decides the model of a row beside the full-precision model and the windows, JSON-ready."""
    method = METHODS[row.method]
    if method.peer is None:
        return {"commands": _commands(row, source)}
    environment, script = method.peer
    return {
        "pins": pins_of(environment),
        "script": [script, SCRIPTS],
        "asked": {"bits": row.bits, "group_size": row.group_size, "seed": row.seed, "options": method.options},
    }


def make(row: Row, source: Source, folder: Path) -> dict[str, Any]:
    """Make the model of a row in `folder/model`, or go on with that.

    Returns:
        Facts: `bits_per_weight`, and what it took.

    Raises:
        RowFailedError: a command has failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _by_us(row, source, folder) if METHODS[row.method].peer is None else _by_a_peer(row, source, folder)


def _commands(row: Row, source: Source) -> list[list[str]]:
    """Return our commands, in order, each but for the folder that it writes and, behind the first, that it reads."""
    symmetric = METHODS[row.method].options.get("symmetric", False)
    spec = ["--quant.bits", str(row.bits), "--quant.group_size", str(row.group_size)]
    spec += ["--quant.symmetric", "true"] * symmetric
    if row.method == ROUNDING:
        return [["rtn", *spec]]
    seen = {"source": source.text, "length": LENGTH, "count": min(row.windows, FIRST_PHASE)}
    seed = ["--seed", str(row.seed)]
    if row.method in OURS:
        stage = "e2e-qp" if row.windows == FIRST_PHASE else "long-e2e-qp"
        tuned = ["--config", f"{source.model}-{row.spec}{'sym' * symmetric}-{stage}"]
        later = {"count": min(row.windows, 4 * LONG_STEPS[row.bits]), "seed": 0}
        return [
            ["block-ap", *spec, *_options("calibration", seen), *seed],
            ["e2e-qp", *tuned, *_options("data", seen | later), *seed],
        ]
    published, seen = f"llama-2-{row.spec}", seen | {"count": row.windows}
    fit = ["--config", f"{published}-block-ap", "--fit.validation_samples", str(VALIDATION)]
    return [
        ["block-ap", *fit, *_options("calibration", seen)],
        ["e2e-qp", "--config", f"{published}-e2e-qp", *_options("data", seen | {"seed": 0})],
    ]


def _options(name: str, values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{name}.{key}", str(value))]


def _by_us(row: Row, source: Source, folder: Path) -> dict[str, Any]:
    costs: list[dict[str, Any]] = []
    before: list[str] = []
    for command, *options in _commands(row, source):
        output = folder / command
        words = [sys.executable, "-m", "eqat_mm", command, "--model", source.model, *options, *before]
        costs.append(_run(command, [*words, "--output", str(output)], folder, dict(os.environ)))
        before = ["--quantized", str(output / "model")]
    if row.windows:
        _require_same_text(folder / "block-ap", digest_of(source.windows(_first_windows(row))))
    (output / "model").rename(folder / "model")
    return {"bits_per_weight": bits_per_weight(folder / "model")} | _took(costs)


def _first_windows(row: Row) -> int:
    return min(row.windows, FIRST_PHASE) if row.method in OURS else row.windows


def _require_same_text(run: Path, expected: str) -> None:
    seen = read_sealed(run / "run.json")["decides"]["inputs"]["data"]
    assert seen == expected, "Block-AP has seen other windows than the peers are given"


def _by_a_peer(row: Row, source: Source, folder: Path) -> dict[str, Any]:
    method = METHODS[row.method]
    assert method.peer is not None
    environment, script = method.peer
    windows = source.windows(row.windows) if row.windows else torch.empty(0, LENGTH, dtype=torch.int64)
    save_file({"windows": windows.contiguous()}, folder / "windows.safetensors")
    paths = {"model": source.folder, "windows": folder / "windows.safetensors", "output": folder / "model"}
    paths["facts"] = folder / "facts.json"
    asked = recipe_of(row, source)["asked"] | {name: str(path.resolve()) for name, path in paths.items()}
    write_json(folder / "job.json", asked)
    words = [str(environment_of(environment)), str(PEERS / f"{script}.py"), str((folder / "job.json").resolve())]
    inherited = {name: value for name, value in os.environ.items() if name not in _OURS_ALONE}
    cost = _run(script, words, folder, inherited)
    facts: dict[str, Any] = read_json(paths["facts"])
    return facts | _took([cost])


def _run(what: str, words: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command, unless it has ended well before; return what it took.

    Raises:
        RowFailedError: it has failed.
    """
    log, kept = folder / f"{what}.log", folder / f"{what}.cost.json"
    if kept.is_file():
        return dict(read_json(kept))
    stopped = log.exists()
    cost = measured(what, shlex.join(words), log, Path.cwd(), environment)
    if cost.status:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise RowFailedError(f"{what} ended with status {cost.status}: {' | '.join(said[-3:])[-600:]}")
    took = {"seconds": cost.seconds, "cpu": cost.cpu, "memory": cost.memory, "stopped": stopped}
    write_json(kept, took)
    return took


def _took(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what processes took, JSON-ready.

    `load` tells whether others were at work beside them; `stopped`, that a command was continued, and what it took
    before is not counted.
    """
    return {
        "seconds": round(sum(cost["seconds"] for cost in costs), 1),
        "cpu_seconds": round(sum(cost["cpu"] for cost in costs), 1),
        "peak_mib": round(max(cost["memory"] for cost in costs)),
        "stopped": any(cost["stopped"] for cost in costs),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[2], 1),
    }
