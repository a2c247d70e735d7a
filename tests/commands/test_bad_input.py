"""Bad input, end to end through the command line: four lines on stderr, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from eqat_mm.cli import main
from eqat_mm.commands.verbs.quantize import rtn
from tests.checkpoint.files import contents
from tests.commands.jobs import rtn_job
from tests.tiny_model import Tiny

LABELS = ["where:", "given:", "allowed:", "do:"]


@dataclass(frozen=True)
class Place:
    """What a case may use: a copy of the tiny model that it may damage, a packed checkpoint likewise, and an output."""

    tiny: Tiny
    model: Path
    packed: Path
    output: Path
    scratch: Path
    capsys: pytest.CaptureFixture[str]

    def block_ap(self, *options: str, model: str | None = None, text: Path | None = None) -> str:
        """Run `eqat block-ap`, which must fail; returns the message."""
        model = model or str(self.model)
        return self.refused(
            *("block-ap", "--model", model, "--recipe_for", json.dumps([model]), "--quant.group_size", "32"),
            *("--calibration", data_of(text or self.tiny.text), "--device", "cpu", "--precision", "float32"),
            *("--fit.epochs", "1", *options),
        )

    def e2e_qp(self, *options: str, quantized: Path | None = None, text: Path | None = None) -> str:
        """Run `eqat e2e-qp`, which must fail; returns the message."""
        model = str(self.model)
        return self.refused(
            *("e2e-qp", "--model", model, "--recipe_for", json.dumps([model])),
            *("--quantized", str(quantized or self.packed), "--data", data_of(text or self.tiny.text)),
            *("--device", "cpu", "--precision", "float32", "--max_steps", "1", *options),
        )

    def rtn(self, *options: str) -> str:
        """Run `eqat rtn`, which must fail; returns the message."""
        return self.refused("rtn", "--model", str(self.model), "--quant.group_size", "32", *options)

    def evaluate(self, *options: str, model: Path | None = None) -> str:
        """Run `eqat eval`, which must fail; returns the message."""
        data = data_of(self.tiny.text, part="held_out")
        return self.refused("eval", "--model", str(model or self.model), "--data", data, "--device", "cpu", *options)

    def refused(self, *argv: str) -> str:
        self.capsys.readouterr()
        status = main([*argv, "--output", str(self.output)])
        said = self.capsys.readouterr().err
        assert status == 2
        assert "Traceback" not in said
        lines = said.splitlines()[-5:]
        assert lines[0].endswith("Error")
        assert [line.split()[0] for line in lines[1:]] == LABELS
        assert all(len(line.split()) > 1 for line in lines[1:])
        assert not self.output.exists()
        return "\n".join(lines)


def data_of(text: Path, **changes: str | int) -> str:
    return json.dumps({"source": str(text), "length": 16, "count": 12} | changes)


@pytest.fixture(scope="module")
def rounded(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rtn(rtn_job(tiny, tmp_path_factory.mktemp("rounded")))


@pytest.fixture
def place(tiny: Tiny, rounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    model, packed = tmp_path / "tiny-llama", tmp_path / "packed" / "model"
    shutil.copytree(tiny.folder, model)
    shutil.copytree(rounded, packed)
    return Place(tiny, model, packed, tmp_path / "output", tmp_path, capsys)


Command = Callable[[Place], str]
QUANTIZERS = pytest.mark.parametrize("command", [Place.block_ap, Place.rtn], ids=["block-ap", "rtn"])
ON_PACKED = pytest.mark.parametrize(
    "command",
    [lambda place: place.evaluate(model=place.packed), Place.e2e_qp],
    ids=["eval", "e2e-qp"],
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


# ---- settings -------------------------------------------------------------------------------------


@QUANTIZERS
def test_a_group_size_that_does_not_divide(place: Place, command: Callable[..., str]) -> None:
    said = command(place, "--quant.group_size", "128")
    assert "model.layers.0.self_attn.q_proj" in said
    assert "in_features=64" in said
    assert "allowed: 32, 64, -1" in said


@QUANTIZERS
def test_a_number_of_bits_that_is_not_stored(place: Place, command: Callable[..., str]) -> None:
    assert "2, 3, 4, 8" in command(place, "--quant.bits", "5")


def test_a_device_that_is_not_there(place: Place) -> None:
    assert "cpu" in place.block_ap("--device", "cuda:99")
    assert "cpu" in place.e2e_qp("--device", "cuda:99")


def test_no_room_on_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "disk: " in place.block_ap("--spool", "disk")


def test_several_processes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one, and no launcher to say how they meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = place.block_ap()
    assert "one process" in said
    assert "torchrun" in said


def test_lanes_that_do_not_divide_a_batch(place: Place) -> None:
    assert "--fit.batch_size 4" in place.block_ap("--fit.batch_size", "4", "--fit.lanes", "3")


# ---- models ---------------------------------------------------------------------------------------


def test_an_unknown_model_lists_near_names(place: Place) -> None:
    said = place.block_ap(model="smolm2-135m")
    assert "'smolm2-135m'" in said
    assert "smollm2-135m" in said.replace("'smolm2-135m'", "")


def test_an_unknown_adapter(place: Place) -> None:
    assert "llama" in place.block_ap("--adapter", "lama").partition("allowed:")[2]


def test_a_model_type_without_an_adapter(place: Place) -> None:
    config = place.model / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"llama"', '"gpt_neox"'), encoding="utf-8")
    said = place.block_ap()
    assert "'gpt_neox'" in said
    assert "docs/adding_a_model.md" in said


@QUANTIZERS
def test_a_folder_without_a_model(place: Place, command: Command) -> None:
    (place.model / "config.json").unlink()
    assert "config.json" in command(place)


def test_a_model_without_a_tokenizer(place: Place) -> None:
    for path in place.model.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in place.block_ap()


@pytest.mark.parametrize(
    "command", [Place.block_ap, Place.rtn, Place.evaluate, lambda place: place.e2e_qp("--loss", "kl")],
    ids=["block-ap", "rtn", "eval", "e2e-qp"],
)  # fmt: skip
def test_truncated_weights(place: Place, command: Command) -> None:
    truncate(place.model / "model.safetensors")
    said = command(place)
    assert "model.safetensors" in said
    assert "truncated" in said


@QUANTIZERS
def test_missing_weights(place: Place, command: Command) -> None:
    (place.model / "model.safetensors").unlink()
    assert "missing model.safetensors" in command(place)


def test_a_model_that_is_quantized_already(place: Place) -> None:
    assert "full-precision model" in place.block_ap(model=str(place.packed))


# ---- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [Place.block_ap, Place.e2e_qp], ids=["block-ap", "e2e-qp"])
class TestText:
    def test_missing(self, place: Place, command: Callable[..., str]) -> None:
        assert "no such file" in command(place, text=place.scratch / "nowhere.txt")

    def test_empty(self, place: Place, command: Callable[..., str]) -> None:
        empty = place.scratch / "empty.txt"
        empty.touch()
        said = command(place, text=empty)
        assert str(empty) in said
        assert "no text" in said

    def test_too_little_for_one_window(self, place: Place, command: Callable[..., str]) -> None:
        option = "--calibration" if command is Place.block_ap else "--data"
        said = command(place, option, data_of(place.tiny.text, length=1_000_000, count=1))
        assert "at least 1000000 tokens for 1 windows" in said


# ---- packed checkpoints ---------------------------------------------------------------------------


def test_e2e_qp_without_a_checkpoint_says_how_to_make_one(place: Place) -> None:
    said = place.e2e_qp(quantized=place.scratch / "model")
    assert f"eqat block-ap --model {place.model}" in said


def test_eval_without_a_checkpoint(place: Place) -> None:
    (place.scratch / "empty").mkdir()
    said = place.evaluate(model=place.scratch / "empty")
    assert "no config.json" in said
    assert "eqat block-ap" in said


def test_eval_of_an_unfinished_checkpoint(place: Place) -> None:
    for name in ("eqat.json", "config.json", "model.safetensors.index.json"):
        (place.packed / name).unlink()
    assert "starting the same command again" in place.evaluate(model=place.packed)


@ON_PACKED
def test_an_altered_byte(place: Place, command: Command) -> None:
    shard = sorted(place.packed.glob("*.safetensors"))[1]
    alter(shard)
    said = command(place)
    assert shard.name in said
    assert "sha256" in said


@ON_PACKED
def test_a_truncated_shard(place: Place, command: Command) -> None:
    shard = sorted(place.packed.glob("*.safetensors"))[0]
    truncate(shard)
    assert shard.name in command(place)


@ON_PACKED
def test_an_unreadable_manifest(place: Place, command: Command) -> None:
    truncate(place.packed / "eqat.json")
    assert "manifest" in command(place)


@ON_PACKED
def test_an_altered_manifest(place: Place, command: Command) -> None:
    path = place.packed / "eqat.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    said = command(place)
    assert "eqat.json" in said
    assert "altered" in said


@ON_PACKED
@pytest.mark.parametrize("other", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "generation_config.json", "eqat.json"])
def test_two_files_that_were_exchanged(place: Place, command: Command, name: str, other: str) -> None:
    """Each is valid, so that only hashes tell."""
    first, second = (place.packed / name).read_bytes(), (place.packed / other).read_bytes()
    (place.packed / name).write_bytes(second)
    (place.packed / other).write_bytes(first)
    said = command(place).partition("allowed:")[0]
    assert name in said or other in said


@QUANTIZERS
def test_another_file_in_place_of_the_tokenizer(place: Place, command: Command) -> None:
    shutil.copyfile(place.model / "generation_config.json", place.model / "tokenizer.json")
    assert "tokenizer.json" in command(place).partition("allowed:")[0]


# ---- a run that is there is not lost to bad input ---------------------------------------------------


@pytest.mark.parametrize("options", [("--device", "cuda:99"), ("--quant.group_size", "128")], ids=str)
def test_overwrite_discards_nothing_on_bad_input(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str]
) -> None:
    rtn(rtn_job(tiny, tmp_path))
    before = contents(tmp_path)
    model = str(tiny.folder)
    arguments = ["--model", model, "--recipe_for", json.dumps([model]), "--output", str(tmp_path), "--overwrite"]
    assert main(["block-ap", *arguments, "--calibration", data_of(tiny.text), *options]) == 2
    assert "ConfigError" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_overwrite_of_e2e_qp_discards_nothing_on_bad_input(place: Place) -> None:
    place.output.mkdir()
    (place.output / "kept").touch()
    alter(sorted(place.packed.glob("*.safetensors"))[0])
    model = str(place.model)
    arguments = ["--model", model, "--recipe_for", json.dumps([model]), "--quantized", str(place.packed)]
    data = ["--data", data_of(place.tiny.text), "--device", "cpu"]
    assert main(["e2e-qp", *arguments, *data, "--output", str(place.output), "--overwrite"]) == 2
    assert (place.output / "kept").exists()
