"""The script that `eqat completion` prints, in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eqat_mm.cli import main
from eqat_mm.commands.line.commands import COMMANDS
from eqat_mm.commands.line.recipes import named_recipe
from eqat_mm.commands.verbs.completion import CompletionJob, completion
from llava_adapters.aliases import ALIASES

PROBE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_eqat
(( ${#COMPREPLY[@]} )) && printf '%s\\n' "${COMPREPLY[@]}"
complete -p eqat
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("shell") / "eqat.sh"
    file.write_text(completion(CompletionJob()), encoding="utf-8")
    return file


def completed(script: Path, *words: str) -> list[str]:
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-c", PROBE, "-", str(script), *words], capture_output=True, text=True, check=True)
    *found, registered = done.stdout.splitlines()
    assert registered == "complete -o default -F _eqat eqat"
    assert done.stderr == ""
    return found


def test_commands(script: Path) -> None:
    assert sorted(completed(script, "eqat", "")) == sorted(COMMANDS)
    assert completed(script, "eqat", "quan") == ["quantize"]
    assert completed(script, "eqat", "no-such") == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["block-ap", "--fit.ep"], ["--fit.epochs"]),
        (["block_ap", "--fit.ep"], ["--fit.epochs"]),
        (["e2e-qp", "m", "--conversations.image"], ["--conversations.images", "--conversations.image_folder"]),
        (["quantize", "m", "--conv"], ["--conversations"]),
        (["block-ap", "--overwrite", ""], ["true", "false"]),
        (["e2e-qp", "--report_to", "t"], ["tensorboard"]),
        (["e2e-qp", "--report-to", "t"], ["tensorboard"]),
        (["e2e-qp", "--report_to", "=", "t"], ["tensorboard"]),
        (["e2e-qp", "--report_to", "="], ["none", "tensorboard", "wandb"]),
        (["rtn", "--quant.bits", ""], ["2", "3", "4", "8"]),
        (["completion", "--shell", ""], ["bash", "zsh"]),
        (["block-ap", "--output", "runs"], []),
        (["block-ap", "llava-v1.6-m"], ["llava-v1.6-mistral-7b"]),
        (["no-such", "--fit"], []),
        (["completion", ""], ["bash", "zsh"]),
        (["demo", ""], []),
    ],
    ids=str,
)
def test_options_and_values(script: Path, words: list[str], found: list[str]) -> None:
    assert sorted(completed(script, "eqat", *words)) == sorted(found)


def test_models_and_recipes(script: Path) -> None:
    assert completed(script, "eqat", "eval", "--model", "") == list(ALIASES)
    recipes = completed(script, "eqat", "e2e-qp", "--config", "llava-1.5-w3")
    assert recipes
    assert all(named_recipe(name) is not None for name in recipes)


def test_every_option_is_there(script: Path) -> None:
    from eqat_mm.commands.line.outline import options_of

    for name in ("block-ap", "quantize", "eval"):
        wanted = {f"--{each.name}" for each in options_of(COMMANDS[name].load()[0]) if each.kind != "settings"}
        assert set(completed(script, "eqat", name, "--")) == wanted


def test_zsh_reads_it_as_bash_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n")
    assert said.endswith("complete -o default -F _eqat eqat\n")
    assert main(["completion", "fish"]) == 2
    assert "bash, zsh" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    program = (
        "import sys; from eqat_mm.cli import main; main(['completion', 'bash']); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ), timeout=60
    )
