"""The precision that products are really made in, whatever runs the model: alone, data-parallel, DeepSpeed.

In one process, which takes itself for a launcher's only one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.checkpoint.read import load
from eqat_mm.commands.line.recipes import deepspeed_path
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.runtime.files import read_json, write_json
from eqat_mm.train.e2e_qp import E2EQPConfig, run_e2e_qp
from eqat_mm.train.end_to_end import WindowDataset, training_arguments
from eqat_mm.train.llm_qat import LLMQATConfig, prepare, run_llm_qat
from eqat_mm.train.parallel import autocast_settings
from llava_adapters.llama import ARCH
from tests.tiny_model import Tiny
from tests.train.problems import CPU
from tests.train.seen import answer_as_on_cuda, watch_kernels, watch_linears

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.usefixtures("no_settings_of_another_test"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # DeepSpeed 0.19.8 calls old collectives; 2026-11-27
]

SETTINGS: dict[str, Any] = {
    "max_steps": 1,
    "batch_size": 2,
    "accumulation": 1,
    "save_steps": 0,
    "learning_rate": 1e-3,
}


@dataclass(frozen=True)
class Case:
    """What is trained for a step, of the tiny model."""

    tiny: Tiny
    packed: Path
    windows: Tensor
    folder: Path

    def seen(self, method: str, how: str | None, precision: Any) -> dict[str, set[torch.dtype]]:
        """Train under DeepSpeed's settings `how`; return the dtypes of the teacher's and the student's products.

        What is not trained is held in that precision, as on a GPU.
        """
        teacher = load_model(self.tiny.folder, CPU, precision)
        taught = watch_linears(teacher)
        settings = SETTINGS | {"precision": precision, "deepspeed": how}
        learned = (self._e2e_qp if method == "e2e-qp" else self._llm_qat)(settings, teacher)
        return {"teacher": taught, "student": learned}

    def _e2e_qp(self, settings: dict[str, Any], teacher: nn.Module) -> set[torch.dtype]:
        config = E2EQPConfig(loss="kl", **settings)
        model = load(self.packed, dtype=config.precision)
        arguments = training_arguments(config, self.folder, CPU)
        with pytest.MonkeyPatch.context() as patch:
            seen = watch_kernels(patch)
            run_e2e_qp(model, WindowDataset(self.windows), config, arguments, teacher=teacher)
        return seen

    def _llm_qat(self, settings: dict[str, Any], teacher: nn.Module) -> set[torch.dtype]:
        config = LLMQATConfig(bits="4-8-4", **settings)
        model = load_model(self.tiny.folder, CPU)
        prepare(model, ARCH, config)
        seen = watch_linears(model)
        arguments = training_arguments(config, self.folder, CPU)
        run_llm_qat(model, WindowDataset(self.windows), config, arguments, teacher=teacher)
        return seen


@pytest.fixture
def case(tiny: Tiny, packed: Path, windows: Tensor, tmp_path: Path) -> Case:
    return Case(tiny, packed, windows, tmp_path)


def both(dtype: torch.dtype) -> dict[str, set[torch.dtype]]:
    return {"teacher": {dtype}, "student": {dtype}}


@pytest.mark.parametrize("method", ["e2e-qp", "llm-qat"])
@pytest.mark.parametrize("how", ["plain", "ddp", "zero-1", "zero-2", "zero-3"])
def test_student_and_teacher_compute_in_bfloat16(
    case: Case, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, method: str, how: str
) -> None:
    answer_as_on_cuda(monkeypatch)
    if how != "plain":
        request.getfixturevalue("launched")
    settings = None if how in ("plain", "ddp") else str(deepspeed_path(how))
    assert case.seen(method, settings, "bfloat16") == both(torch.bfloat16)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(("precision", "other"), [("float32", True), ("bfloat16", False)])
def test_the_precision_decides_and_not_the_file(
    case: Case, monkeypatch: pytest.MonkeyPatch, precision: str, other: bool
) -> None:
    answer_as_on_cuda(monkeypatch)
    settings = read_json(deepspeed_path("zero-3")) | {"torch_autocast": {"enabled": other, "dtype": "bfloat16"}}
    write_json(case.folder / "mine.json", settings)
    assert case.seen("e2e-qp", str(case.folder / "mine.json"), precision) == both(getattr(torch, precision))


def test_gradients_are_summed_in_float32() -> None:
    """DeepSpeed would sum those of dense linears, such as a projector's, in the dtype of the products."""
    assert autocast_settings("bfloat16")["torch_autocast"]["lower_precision_safe_modules"] == []
