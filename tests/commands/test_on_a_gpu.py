"""The jobs on a GPU: what they compute in, and that they come near the CPU's results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eqat_mm.checkpoint.read import load
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.verbs.evaluate import evaluate
from eqat_mm.commands.verbs.generate import GenerateJob, generate
from eqat_mm.commands.verbs.quantize import rtn
from eqat_mm.commands.verbs.tune import e2e_qp
from eqat_mm.runtime.files import read_json
from tests.checkpoint.files import tensors_of
from tests.commands.jobs import e2e_qp_job, rtn_job
from tests.commands.test_evaluate import job_of
from tests.tiny_model import Tiny
from tests.tolerances import assert_close
from tests.train.seen import watch_kernels

pytestmark = pytest.mark.gpu
LAST = f"cuda:{max(0, torch.cuda.device_count() - 1)}"
"""Where there are several, not the first: it is not the current one."""


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("packed")))


def test_a_model_is_bfloat16_but_for_its_step_sizes(tiny: Tiny, packed: Path) -> None:
    model = load(packed, device=LAST)
    scales = {parameter.dtype for name, parameter in model.named_parameters() if name.endswith(".weight_scale")}
    assert scales == {torch.float32}
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert load_model(tiny.folder, torch.device(LAST)).lm_head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_e2e_qp_comes_near_the_step_sizes_of_the_cpu(
    tiny: Tiny, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    e2e_qp(e2e_qp_job(tiny, packed, tmp_path / "cpu"))
    seen = watch_kernels(monkeypatch)
    e2e_qp(e2e_qp_job(tiny, packed, tmp_path / "gpu", device=LAST, precision=precision))
    dtype = torch.bfloat16 if precision == "auto" else torch.float32
    assert seen == {dtype}
    assert read_json(tmp_path / "gpu" / "run.json")["config"]["precision"] == str(dtype).removeprefix("torch.")
    ours, theirs = tensors_of(tmp_path / "gpu" / "model"), tensors_of(tmp_path / "cpu" / "model")
    for name in (name for name in ours if name.endswith(".weight_scale")):
        assert_close(ours[name].float(), theirs[name].float(), "model", torch.bfloat16)


def test_the_packed_model_writes_and_is_evaluated(tiny: Tiny, packed: Path) -> None:
    assert generate(GenerateJob(str(packed), prompt="w5 w17 w42", max_new_tokens=8, device=LAST))
    found, expected = (evaluate(job_of(tiny, packed, reference=tiny.folder, device=device)) for device in (LAST, "cpu"))
    assert (found["precision"], expected["precision"]) == ("bfloat16", "float32")
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.05)
