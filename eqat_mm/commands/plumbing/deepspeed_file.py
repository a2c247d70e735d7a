"""DeepSpeed's settings: a JSON file, checked against the job before anything else is done.

The job decides rates, batch sizes and precision. A file that says the same, or "auto", is taken; one that says
otherwise is refused, for DeepSpeed would follow it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eqat_mm.commands.line.recipes import deepspeed_path
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.device import launched, processes
from eqat_mm.runtime.progress import say
from eqat_mm.runtime.settings import shown
from eqat_mm.train.end_to_end import EndToEndConfig

_SIXTEEN_BITS = ("fp16", "bf16", "bfloat16", "amp")
_SECTIONS = (*_SIXTEEN_BITS, "zero_optimization", "optimizer", "scheduler")


@dataclass(frozen=True)
class DeepSpeedFile:
    """Checked settings of DeepSpeed; as text, the JSON that transformers reads.

    Attributes:
        name: of the file, or of the shipped settings.
        settings: without the sections that the job decides.
    """

    name: str
    settings: dict[str, Any]

    @property
    def stage(self) -> int:
        """Stage of ZeRO."""
        return int(self.settings.get("zero_optimization", {}).get("stage", 0))

    def __str__(self) -> str:
        return json.dumps(self.settings)


def deepspeed_settings(job: EndToEndConfig) -> DeepSpeedFile | None:
    """Return DeepSpeed's settings, where a job names some and a launcher started this process.

    Raises:
        ConfigError: no such file, one that cannot be read or that contradicts the job, or DeepSpeed is not installed.
    """
    if job.deepspeed is None:
        return None
    found = checked(job.deepspeed, job, processes())
    if launched() and find_spec("deepspeed") is None:
        raise ConfigError(
            where=f"--deepspeed {job.deepspeed}",
            given="DeepSpeed is not installed",
            allowed="an environment with it",
            do="pip install 'eqat-mm[deepspeed]', or leave --deepspeed out",
        )
    return found if launched() else None


def checked(name: str, job: EndToEndConfig, world: int) -> DeepSpeedFile:
    """Read and check DeepSpeed's settings.

    Args:
        name: path of a JSON file, or name of shipped settings.
        job: whose numbers they must agree with.
        world: how many processes train.

    Raises:
        ConfigError: no such file, one that cannot be read or that contradicts the job.
    """
    settings = _read(deepspeed_path(name), name)
    for section in _SECTIONS:
        if not isinstance(settings.get(section, {}), dict):
            raise _refused(name, f'"{section}": {shown(settings[section])}', "an object", f'correct "{section}"')
    if settings.get("zero_optimization", {}).get("stage", 0) not in range(4):
        raise _refused(name, "another stage of ZeRO", "0, 1, 2 or 3", 'correct "stage"')
    _check_precision(name, settings)
    _check_numbers(name, settings, job, world)
    return DeepSpeedFile(name, _without_optimizer(name, settings))


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(name, " ".join(str(error).split()), "JSON in UTF-8", "correct the file") from error
    if not isinstance(settings, dict):
        raise _refused(name, shown(settings), "an object of DeepSpeed's settings", "correct the file")
    return settings


def _check_precision(name: str, settings: dict[str, Any]) -> None:
    for section in _SIXTEEN_BITS:
        if settings.get(section, {}).get("enabled", False) not in (False, "auto"):
            raise _refused(
                name,
                f'"{section}" enabled',
                f'"{section}" left out, false or "auto": --precision decides, and what is trained is float32',
                f'set "enabled" to "auto" in "{section}"; --precision bfloat16 makes matrix products in bfloat16',
            )


def _check_numbers(name: str, settings: dict[str, Any], job: EndToEndConfig, world: int) -> None:
    step = job.batch_size * job.accumulation * world
    wanted: dict[str, tuple[float, str]] = {
        "train_micro_batch_size_per_gpu": (job.batch_size, f"--batch_size {job.batch_size}"),
        "gradient_accumulation_steps": (job.accumulation, f"--accumulation {job.accumulation}"),
        "gradient_clipping": (job.clip_norm, f"--clip_norm {job.clip_norm:g}"),
        "train_batch_size": (step, f"{step}, --batch_size times --accumulation times {world} processes"),
    }
    if not launched():
        del wanted["train_batch_size"]  # it is for the processes that there will be
    for key, (number, words) in wanted.items():
        if settings.get(key, "auto") not in ("auto", number):
            given = f'"{key}": {shown(settings[key])}, and {words}'
            raise _refused(name, given, f'{number:g} or "auto"', f'set "{key}" to "auto"; the options decide')


def _without_optimizer(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without optimizer and schedule, which the job decides: DeepSpeed's know one rate for everything.

    Raises:
        ConfigError: they are fixed, so leaving them out would not be what the file says.
    """
    dropped = [section for section in ("optimizer", "scheduler") if section in settings]
    for section in dropped:
        fixed = _fixed(settings[section])
        if fixed:
            raise _refused(
                name,
                f'"{section}" with {", ".join(fixed)}',
                'no such section, or "auto" for every number: --learning_rate and the other options decide',
                f'remove "{section}" from the file, and give its numbers as options',
            )
    kept = {key: value for key, value in settings.items() if key not in dropped}
    if "offload_optimizer" in kept.get("zero_optimization", {}):
        kept.setdefault("zero_force_ds_cpu_optimizer", False)
    if dropped:
        say(f"--deepspeed {name}: {' and '.join(dropped)} left out, the options of the command decide them")
    return kept


def _fixed(section: dict[str, Any]) -> list[str]:
    """Return what an optimizer or a schedule says that is not left to the job."""
    params = section.get("params", {})
    if not isinstance(params, dict):
        return [f"params: {shown(params)}"]
    fixed = [f"{key}: {shown(value)}" for key, value in params.items() if value != "auto" and key != "torch_adam"]
    known = str(section.get("type", "AdamW")).lower() in ("adam", "adamw", "warmuplr", "warmupdecaylr")
    return fixed if known else [f"type: {shown(section['type'])}", *fixed]


def _refused(name: str, given: str, allowed: str, do: str) -> ConfigError:
    return ConfigError(where=f"--deepspeed {name}", given=given, allowed=allowed, do=do)
