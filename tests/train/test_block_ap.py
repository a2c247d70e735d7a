"""The run over all blocks: what it writes, and that a run which was stopped gives what an undisturbed one gives."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.blocks.source import open_model
from eqat_mm.blocks.spool import Stream
from eqat_mm.checkpoint.manifest import Manifest
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.errors import CheckpointError, ConfigError, ResourceError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime import room
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.sealed import read_sealed, write_sealed
from eqat_mm.train import block_ap, commit, fit
from eqat_mm.train.block_ap import BlockAPConfig, check_room, quantize_block, run_block_ap, streams_on_disk
from eqat_mm.train.fit import FitConfig, fit_block
from eqat_mm.train.report import FitReport
from eqat_mm.train.warm_start import WarmStartConfig
from llava_adapters.llama import ARCH
from tests.checkpoint.files import assert_four_lines, contents, same_weights
from tests.tiny_model import Tiny, save_tiny
from tests.train.problems import CPU, LENGTH, SAMPLES, SPEC, batches_of, walker_of
from tests.train.stopping import Stopped

BLOCKS = 3
HIDDEN = 64
CONFIG = BlockAPConfig(
    SPEC,
    WarmStartConfig(init="gptq"),
    FitConfig(epochs=1, lr_weight=2e-3, validation_samples=3),
    precision="float32",
    batch_tokens=64,
)
KEPT = [("ram", "recompute"), ("ram", "files"), ("disk", "recompute"), ("disk", "files")]
"""Where streams are kept, and how they are committed."""

Run = Callable[..., Manifest]


@pytest.fixture
def run(tiny: Tiny) -> Run:
    def start(folder: Path, config: BlockAPConfig = CONFIG) -> Manifest:
        record = {"config": {"epochs": 1}}
        opened, batches = open_model(tiny.folder, ARCH), batches_of(tiny)
        return run_block_ap(opened, batches, config, folder, device=CPU, source="tiny", provenance=record)

    return start


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    opened, record = open_model(tiny.folder, ARCH), {"config": {"epochs": 1}}
    run_block_ap(opened, batches_of(tiny), CONFIG, folder, device=CPU, source="tiny", provenance=record)
    return folder


def metrics(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def stop_in_block(monkeypatch: pytest.MonkeyPatch, index: int) -> list[int]:
    """Stop the run when block `index` is to be fitted; returns the list of fitted blocks."""
    fitted: list[int] = []

    def fit_or_stop(walker: Any, step: Any, *args: Any, **kwargs: Any) -> FitReport:
        if step.index == index:
            raise Stopped
        fitted.append(step.index)
        return fit_block(walker, step, *args, **kwargs)

    monkeypatch.setattr(block_ap, "fit_block", fit_or_stop)
    return fitted


# ---- what is written ------------------------------------------------------------------------------


def test_a_run_leaves_a_checkpoint_metrics_and_nothing_else(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == {"model", "metrics.jsonl", "state.json"}
    manifest = verify_checkpoint(undisturbed / "model")
    assert (manifest.stage, manifest.source, manifest.spec) == ("block-ap", "tiny", SPEC.as_dict())
    logits = load(undisturbed / "model")(input_ids=torch.tensor([[2, 3, 4]])).logits
    assert logits.isfinite().all()


def test_metrics_have_one_record_per_block(undisturbed: Path) -> None:
    records = read_json(undisturbed / "state.json")["records"]
    assert [record["block"] for record in records] == list(range(BLOCKS))
    assert [record["name"] for record in records] == [f"model.layers.{index}" for index in range(BLOCKS)]
    assert len(metrics(undisturbed)) == BLOCKS
    for record in records:
        assert record["loss_after"] <= record["loss_before"]
        assert record["steps"] == 5
        assert record["relative_error"] > 0
        assert record["seconds"] > 0
        assert record["peak_bytes"] > 0


def test_one_line_per_block_is_printed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("block ")]
    assert len(lines) == BLOCKS
    form = r"block 1/3 +33\.3%  5 steps  loss [\d.e-]+ -> [\d.e-]+  relative error \d\.\d{3}  "
    assert re.fullmatch(form + r"lr \d\.\d\de-0\d  [\d,]+ tok/s  \d+\.\d\d GiB  eta \d+s", lines[0])


def test_norms_are_those_that_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantized stream must be that of the checkpoint, whose norms have the dtype of the source."""
    tiny = save_tiny(tmp_path, dtype=torch.bfloat16)
    walker = walker_of(tiny)
    step = next(walker.walk())
    falling = iter((2.0, 1.0))
    monkeypatch.setattr(fit._BlockFit, "evaluate", lambda _: next(falling))  # keep whatever comes out
    source = walker.opened.source.read(f"{step.name}.input_layernorm.weight")
    quantize_block(walker, step, replace(CONFIG, fit=FitConfig(epochs=1, lr_norm=1e-2, validation_samples=0)))
    norm = step.block.get_submodule("input_layernorm").weight
    assert isinstance(norm, nn.Parameter)
    assert source.dtype is torch.bfloat16
    assert not torch.equal(norm, source.float())
    assert torch.equal(norm, norm.bfloat16().float())


# ---- the same weights, however it was run ---------------------------------------------------------


def test_two_runs_give_the_same_weights(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    run(tmp_path)
    assert same_weights(tmp_path / "model", undisturbed / "model")


def test_streams_on_disk_give_the_same_weights(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, spool="disk"))
    assert same_weights(tmp_path / "model", undisturbed / "model")
    assert not (tmp_path / "streams").exists()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("stopped_in", range(BLOCKS))
def test_a_stopped_run_is_continued(
    run: Run, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: int, kept: Any
) -> None:
    config = replace(CONFIG, spool=kept[0], commit=kept[1])
    with monkeypatch.context() as patch:
        stop_in_block(patch, stopped_in)
        with pytest.raises(Stopped):
            run(tmp_path, config)
    assert len(metrics(tmp_path)) == stopped_in
    assert not (tmp_path / "model" / "eqat.json").exists()
    fitted = stop_in_block(monkeypatch, BLOCKS)
    run(tmp_path, config)
    assert fitted == list(range(stopped_in, BLOCKS))
    assert same_weights(tmp_path / "model", undisturbed / "model")
    assert len(metrics(tmp_path)) == BLOCKS


@pytest.mark.parametrize("kept", KEPT)
def test_streams_in_bfloat16_are_continued(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Any
) -> None:
    config = replace(CONFIG, stream_dtype="bfloat16", spool=kept[0], commit=kept[1])
    run(tmp_path / "undisturbed", config)
    with monkeypatch.context() as patch:
        stop_in_block(patch, 2)
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", config)
    run(tmp_path / "stopped", config)
    assert same_weights(tmp_path / "stopped" / "model", tmp_path / "undisturbed" / "model")


def test_trained_norms_and_weights_are_computed_with_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes out of training is kept, norms are stored in 16 bits: the shards must give the same stream."""
    falling = iter(range(10**6, 0, -1))
    monkeypatch.setattr(fit._BlockFit, "evaluate", lambda _: float(next(falling)))
    tiny = save_tiny(tmp_path, dtype=torch.bfloat16, blocks=BLOCKS)
    config = replace(CONFIG, fit=FitConfig(epochs=1, lr_weight=2e-3, lr_norm=1e-2, validation_samples=0))
    streams: list[Tensor] = []

    def start(folder: Path) -> None:
        opened, record = open_model(tiny.folder, ARCH), {"config": {}}
        run_block_ap(opened, batches_of(tiny), config, folder, device=CPU, source="tiny", provenance=record)

    def look(walker: Any, step: Any, *args: Any, **kwargs: Any) -> FitReport:
        if step.index == BLOCKS - 1:
            streams.append(torch.cat([step.quantized.read(index) for index in range(SAMPLES)]))
        return fit_block(walker, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        stop_in_block(patch, BLOCKS - 1)
        with pytest.raises(Stopped):
            start(tmp_path / "stopped")
    monkeypatch.setattr(block_ap, "fit_block", look)
    start(tmp_path / "stopped")
    start(tmp_path / "undisturbed")
    assert torch.equal(*streams)
    assert same_weights(tmp_path / "stopped" / "model", tmp_path / "undisturbed" / "model")


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("moment", ["write_sealed", "append_jsonl"])
def test_a_stop_while_a_block_is_committed(
    run: Run, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, kept: Any
) -> None:
    calls, config = 0, replace(CONFIG, spool=kept[0], commit=kept[1])
    function = getattr(commit, moment)

    def stop_at_the_second(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stopped
        function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(commit, moment, stop_at_the_second)
        with pytest.raises(Stopped):
            run(tmp_path, config)
    run(tmp_path, config)
    assert same_weights(tmp_path / "model", undisturbed / "model")
    assert len(metrics(tmp_path)) == BLOCKS


def test_a_stop_before_the_manifest(
    run: Run, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", stop)
        with pytest.raises(Stopped):
            run(tmp_path)
    fitted = stop_in_block(monkeypatch, BLOCKS)
    run(tmp_path)
    assert fitted == []
    assert same_weights(tmp_path / "model", undisturbed / "model")


# ---- what is written of the streams, and when -----------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes written to each file of a stream, as they grow."""
    count: dict[str, int] = defaultdict(int)

    def counting(name: str, path_of: Callable[..., Path | None], size_of: Callable[..., int]) -> None:
        method = getattr(Stream, name)

        def counted(self: Stream, *args: Any) -> Any:
            path, size = path_of(self, *args), size_of(self, *args)
            if (path is not None and path != self.path) or name != "save":
                count[str(path and path.name)] += size
            return method(self, *args)

        monkeypatch.setattr(Stream, name, counted)

    counting("append", lambda self, value: self.path, lambda self, value: value.numel() * self.dtype.itemsize)
    counting(
        "write",
        lambda self, index, value: self._next and Path(self._next.name),
        lambda self, index, value: value.numel() * self.dtype.itemsize,
    )
    counting("save", lambda self, path: path, lambda self, path: self.nbytes)
    return count


@pytest.mark.parametrize("kept", KEPT)
def test_each_stream_is_written_once_per_block_or_not_at_all(
    run: Run, tmp_path: Path, written: dict[str, int], kept: Any
) -> None:
    """On the disk: nothing for streams in RAM that are computed again, else each stream once behind every block."""
    run(tmp_path, replace(CONFIG, spool=kept[0], commit=kept[1]))
    in_ram = written.pop("None", 0)
    stream = SAMPLES * LENGTH * HIDDEN * 4
    files = {"recompute": [], "files": range(1, BLOCKS + 1)}[kept[1]] if kept[0] == "ram" else range(BLOCKS + 1)
    assert written == {f"{name}-{passed:05d}.bin": stream for name in ("fp", "quantized") for passed in files}
    assert in_ram == (2 * (BLOCKS + 1) * stream if kept[0] == "ram" else 0)


@pytest.mark.parametrize("kept", KEPT)
def test_the_disk_holds_what_was_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Any
) -> None:
    config = replace(CONFIG, spool=kept[0], commit=kept[1])
    most, folder = 0, tmp_path / "streams"

    def look(*_: Any, **__: Any) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in folder.glob("*.bin")))

    write, save = Stream.rewritten, commit.write_sealed
    monkeypatch.setattr(commit, "write_sealed", lambda *args: (look(), save(*args)))

    @contextmanager
    def watched(self: Stream, path: Path | None) -> Iterator[None]:
        with write(self, path):
            yield
        look()

    monkeypatch.setattr(Stream, "rewritten", watched)
    run(tmp_path, config)
    assert most == streams_on_disk(config) * SAMPLES * LENGTH * HIDDEN * 4


def test_only_the_committed_streams_are_left(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a stop, the next run removes what no commit holds, before it captures anything."""
    config = replace(CONFIG, spool="disk")
    stopped_run(run, tmp_path, monkeypatch, config)
    names = {path.name for path in (tmp_path / "streams").iterdir()}
    assert names == {"fp-00001.bin", "fp-00002.bin", "quantized-00001.bin"}

    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(block_ap, "capture_front", stop)
    with pytest.raises(Stopped):
        run(tmp_path, config)
    assert {path.name for path in (tmp_path / "streams").iterdir()} == {"fp-00001.bin", "quantized-00001.bin"}


def flipped(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncated(path: Path) -> None:
    """Cut the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("damage", [flipped, truncated, Path.unlink])
def test_a_damaged_shard_is_said_and_made_again(
    run: Run,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    with monkeypatch.context() as patch:
        stop_in_block(patch, 2)
        with pytest.raises(Stopped):
            run(tmp_path)
    damage(tmp_path / "model" / "model-00002-of-00004.safetensors")
    fitted = stop_in_block(monkeypatch, BLOCKS)
    run(tmp_path)
    assert fitted == [1, 2]
    assert "model-00002-of-00004.safetensors is not what was committed" in capsys.readouterr().out
    assert same_weights(tmp_path / "model", undisturbed / "model")


@pytest.mark.parametrize("kept", [("ram", "files"), ("disk", "files")])
@pytest.mark.parametrize("damage", [flipped, truncated, Path.unlink, "swapped"])
def test_damaged_streams_are_said_and_computed_again(
    run: Run,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Any,
    kept: Any,
) -> None:
    config = replace(CONFIG, spool=kept[0], commit=kept[1])
    stopped_run(run, tmp_path, monkeypatch, config)
    fp, quantized = (tmp_path / "streams" / f"{name}-00001.bin" for name in ("fp", "quantized"))
    if damage == "swapped":
        other = fp.read_bytes()
        fp.write_bytes(quantized.read_bytes())
        quantized.write_bytes(other)
    else:
        damage(quantized)
    run(tmp_path, config)
    assert "no whole streams" in capsys.readouterr().out
    assert same_weights(tmp_path / "model", undisturbed / "model")


STATES = {
    "truncated": lambda text: text[:100],
    "empty": lambda _: "",
    "a list": lambda _: "[]",
    "no records": lambda _: "{}",
    "a figure changed": lambda text: text.replace('"steps": 5', '"steps": 6'),
    "deep": lambda _: "[" * 100_000,
}


@pytest.mark.parametrize("damage", STATES.values(), ids=STATES)
def test_a_damaged_state_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[str], str]
) -> None:
    stopped_run(run, tmp_path, monkeypatch)
    state = tmp_path / "state.json"
    state.write_text(damage(state.read_text(encoding="utf-8")), encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"state\.json") as raised:
        run(tmp_path)
    assert_four_lines(raised.value)
    assert contents(tmp_path) == before


def test_the_state_of_another_model_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_run(run, tmp_path, monkeypatch)
    state = read_sealed(tmp_path / "state.json")
    many = {"records": state["records"] * 12, "shards": state["shards"] * 12, "streams": {}}
    write_sealed(tmp_path / "state.json", many)
    with pytest.raises(CheckpointError, match="a model of 3 blocks"):
        run(tmp_path)


@pytest.mark.parametrize(("device", "auto"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_the_dtype_of_streams_follows_the_device(device: str, auto: torch.dtype) -> None:
    assert BlockAPConfig().stream_dtype_on(torch.device(device)) is auto
    assert BlockAPConfig(stream_dtype="float32").stream_dtype_on(torch.device(device)) is torch.float32
    assert BlockAPConfig(stream_dtype="bfloat16").stream_dtype_on(torch.device(device)) is torch.bfloat16


def test_streams_are_committed_as_files_where_they_are_files() -> None:
    assert not BlockAPConfig(spool="ram").commits_streams
    assert BlockAPConfig(spool="disk").commits_streams
    assert BlockAPConfig(spool="ram", commit="files").commits_streams
    assert not BlockAPConfig(spool="disk", commit="recompute").commits_streams


# ---- refused before anything is written -----------------------------------------------------------


def stopped_run(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, config: BlockAPConfig = CONFIG) -> None:
    with monkeypatch.context() as patch:
        stop_in_block(patch, 1)
        with pytest.raises(Stopped):
            run(folder, config)


def test_a_full_disk_is_noticed_first(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    opened, tokens, config = open_model(tiny.folder, ARCH), SAMPLES * LENGTH, replace(CONFIG, spool="disk")
    with pytest.raises(ResourceError) as raised:
        check_room(opened, tokens, config, tmp_path / "run", CPU)
    assert_four_lines(raised.value)
    check_room(opened, tokens, config, tmp_path / "run", CPU, written=2**30)  # by an earlier start


def test_too_little_memory_is_noticed_first(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * SAMPLES * LENGTH * HIDDEN * 4
    monkeypatch.setattr(room, "available_bytes", lambda: needed - 1)
    opened, tokens = open_model(tiny.folder, ARCH), SAMPLES * LENGTH
    with pytest.raises(ResourceError) as raised:
        check_room(opened, tokens, CONFIG, tmp_path, CPU)
    assert_four_lines(raised.value)
    check_room(opened, tokens, replace(CONFIG, stream_dtype="bfloat16"), tmp_path, CPU)
    check_room(opened, tokens, replace(CONFIG, spool="disk"), tmp_path, CPU)


def test_a_group_size_that_does_not_divide_is_noticed_first(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        run(tmp_path / "run", replace(CONFIG, quant=QuantSpec(2, 128)))
    assert not (tmp_path / "run").exists()
