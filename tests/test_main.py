"""`python -m eqat_mm`, alone and as a launcher starts it, from a folder that is no checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eqat_mm import __version__
from eqat_mm.cli import main
from eqat_mm.commands.verbs.quantize import rtn
from tests.checkpoint.files import tensors_of
from tests.commands.jobs import rtn_job
from tests.commands.launching import DATA_PARALLEL, DEEPSPEED, ROOT, TRAINING, environment
from tests.tiny_model import Tiny, save_tiny

SCRIPTS = ROOT / "scripts"
PACKAGES = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'eval'}"}


def test_what_deepspeed_puts_in_front_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=0", "--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    folder = tmp_path_factory.mktemp("elsewhere")
    tiny = save_tiny(folder)
    rtn(rtn_job(tiny, folder / "rtn"))
    return tiny, folder


def started(place: tuple[Tiny, Path], name: str, launcher: list[str]) -> subprocess.CompletedProcess[str]:
    tiny, folder = place
    flags = {"model": tiny.folder, "quantized": folder / "rtn" / "model", "output": folder / name}
    flags |= {"data.source": tiny.text, "data.length": 16, "data.count": 24, "loss": "kl", **TRAINING, "max_steps": 3}
    words = [*launcher, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]
    words += (
        ["--global_batch", "4"]
        if not name.startswith("deepspeed")
        else ["--global_batch", "4", "--deepspeed", "zero-2"]
    )
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment() | PACKAGES, cwd=folder, timeout=400
    )


@pytest.mark.parametrize("script", ["block_ap", "e2e_qp", "llm_qat", "generate_data", "eval"])
def test_a_script_is_a_command(script: str) -> None:
    words = [sys.executable, str(SCRIPTS / f"{script}.py"), "--help"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith(f"usage: eqat {script.replace('_', '-')} ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("torchrun", [*DATA_PARALLEL, "-m", "eqat_mm", "e2e-qp"]),
        ("deepspeed", [*DEEPSPEED, "--module", "eqat_mm", "e2e-qp"]),
        ("deepspeed of a script", [*DEEPSPEED, str(SCRIPTS / "e2e_qp.py")]),
    ],
)
def test_launchers_start_it(place: tuple[Tiny, Path], name: str, launcher: list[str]) -> None:
    done = started(place, name, launcher)
    assert done.returncode == 0, done.stderr
    alone = place[1] / "alone"
    if not alone.exists():
        assert started(place, "alone", [sys.executable, "-m", "eqat_mm", "e2e-qp"]).returncode == 0
    found, expected = tensors_of(place[1] / name / "model"), tensors_of(alone / "model")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].float().sub(value.float()).abs().max() <= 0.02 * value.float().abs().max(), key
