"""The model card of an exported folder: what it is, how it was made, how good it is, whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eqat_mm.export.opened import PackedModel
from eqat_mm.runtime.files import write_text

CARD = "README.md"
_METHODS = {
    "rtn": "rounding to nearest",
    "block-ap": "Block-AP (EfficientQAT, arXiv 2407.11062)",
    "e2e-qp": "E2E-QP (EfficientQAT, arXiv 2407.11062)",
    "llm-qat": "LLM-QAT (arXiv 2305.17888)",
}
_TAGS = ("eqat-mm", "quantized")


@dataclass(frozen=True)
class Facts:
    """What a card says beside what the checkpoint says of itself.

    Attributes:
        form: name of the format.
        bits_per_weight: of the checkpoint's quantized weights, step sizes and zero points included.
        usage: lines on how the files are used.
        quality: lines of measured quality.
        licence: of the base model; None where it is not known here.
        change: what the format holds with other values; empty where nothing.
    """

    form: str
    bits_per_weight: float
    usage: Sequence[str] = ()
    quality: Sequence[str] = ()
    licence: str | None = None
    change: str = ""


def licence_of(card: Path) -> str | None:
    """Return the licence that a model card names in its header; None where there is no such file, or none in it."""
    if not card.is_file():
        return None
    head, found = _header(card.read_text(encoding="utf-8", errors="replace")), None
    if isinstance(head, dict):
        found = head.get("license_name") or head.get("license")
    return str(found) if found else None


def _header(text: str) -> Any:
    parts = text.split("---\n", 2)
    try:
        return yaml.safe_load(parts[1]) if text.startswith("---\n") and len(parts) == 3 else None
    except yaml.YAMLError:
        return None


def write_card(model: PackedModel, folder: Path, facts: Facts) -> None:
    """Write the card of an exported model."""
    source = model.manifest.source
    header = {"license": facts.licence or "other", "base_model": source, "tags": [*_TAGS, facts.form]}
    header |= {} if facts.licence else {"license_name": "that of the base model"}
    body = [
        f"# {Path(source).name}, {model.spec.name}, {facts.form}",
        _what(model, facts),
        "## Use\n\n" + "\n".join(facts.usage),
        "## How it was made\n\n" + "\n".join(_stages(model)),
        "## Quality\n\n" + ("\n".join(f"- {line}" for line in facts.quality) or "Not measured yet: `eqat eval`."),
        f"## Licence\n\nThat of the base model {source}: {facts.licence or 'see there'}.",
    ]
    text = f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(body) + "\n"
    write_text(folder / CARD, text)


def _what(model: PackedModel, facts: Facts) -> str:
    spec = model.spec
    grid = "symmetric" if spec.symmetric else "asymmetric"
    group = "rows" if spec.group_size == -1 else f"groups of {spec.group_size}"
    exact = facts.change or "Every quantized weight has the value that it has in the checkpoint."
    return (
        f"{model.manifest.source} with the linear layers of its decoder blocks at {spec.widths} bits, on {grid} "
        f"grids in {group}: {facts.bits_per_weight:.2f} bits per weight in the checkpoint. {exact}"
    )


def _stages(model: PackedModel) -> list[str]:
    """Return a line for each stage, with its settings, seed and versions."""
    lines = []
    for stage in model.manifest.provenance:
        command = str(stage.get("command", ""))
        versions = stage.get("versions", {})
        made = (
            f"eqat-mm {stage.get('revision') or versions.get('eqat-mm')}, transformers {versions.get('transformers')}"
        )
        lines.append(f"- {_METHODS.get(command, command)}, seed {stage.get('seed')}, with {made}:")
        lines.append(f"  `{_settings(stage.get('config', {}))}`")
    return lines


def _settings(config: dict[str, Any]) -> str:
    """Return settings as options, without places of this machine and what was left at null."""
    places = ("output", "quantized", "device", "source", "image_folder", "overwrite", "recipe_for", "report_to")
    flat = [(name, value) for name, value in _flat(config) if name.rpartition(".")[2] not in places]
    return " ".join(f"--{name} {_named(value) if name in ('model', 'paths') else value}" for name, value in flat)


def _named(paths: str | list[str]) -> str:
    return " ".join(Path(path).name for path in ([paths] if isinstance(paths, str) else paths))


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in config.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], ""):
            flat.append((prefix + name, value))
    return flat
