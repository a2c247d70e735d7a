"""What produced a result: versions, source revision, seed and the resolved configuration."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from eqat_mm.errors import ConfigError

_PACKAGES = (
    "eqat-mm",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "safetensors",
    "compressed-tensors",
)

_DO_BY_DEFAULT = "use the same settings, --overwrite to replace that run, or another --output"
_DO = {"samples_per_step": "--global_batch with that number keeps it, whatever the number of processes"}
"""What to do about a setting that must stay the same."""


def provenance(command: str, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a JSON-ready record of the run: command, configuration, seed, versions, revision, time."""
    return {
        "command": command,
        "config": config,
        "seed": seed,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "revision": _revision(),
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of this package and of those it computes with; None for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def require_same_config(saved: dict[str, Any], given: dict[str, Any], where: str) -> None:
    """Check that a run is continued with the settings it was started with.

    Raises:
        ConfigError: names the settings that differ.
    """
    for key, (started, now), different in differences(saved, given):
        raise ConfigError(
            where=f"{where}: {different}",
            given=f"{key}={_short(now)}",
            allowed=f"{key}={_short(started)}, as the run in this folder was started",
            do=_DO.get(key, _DO_BY_DEFAULT),
        )


def require_same_everywhere(configs: Sequence[dict[str, Any]]) -> None:
    """Check that all processes of a job were started with the settings of the first.

    Args:
        configs: one per process.

    Raises:
        ConfigError: names a process, and the settings that differ.
    """
    for rank, config in enumerate(configs):
        for key, (first, other), different in differences(configs[0], config):
            raise ConfigError(
                where=f"process {rank} of {len(configs)}: {different}",
                given=f"{key}={other!r}",
                allowed=f"{key}={first!r}, as in process 0",
                do="start all processes with the same command, on the same model and data",
            )


def _short(value: Any) -> str:
    """Return a value for a message; of a hash its beginning."""
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value)
    return f"hash {value[:12]}..." if is_hash else repr(value)


def differences(saved: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any], str]]:
    """Yield each setting that differs, its two values, and the names of all that do."""
    saved, given = _dotted(saved), _dotted(given)
    different = sorted(key for key in saved.keys() | given.keys() if saved.get(key) != given.get(key))
    for key in different:
        yield key, (saved.get(key), given.get(key)), ", ".join(different)


def _dotted(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: {"fit": {"epochs": 2}} -> {"fit.epochs": 2}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Commit of the source tree this package runs from; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
