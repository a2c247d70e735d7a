"""Block-AP on conversations about images: the streams are those of the model, and both kinds of tokens count."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from eqat_mm.blocks.source import OpenModel, open_model
from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.checkpoint.folders import load_for_inference
from eqat_mm.cli import main
from eqat_mm.commands.plumbing import calibration
from eqat_mm.commands.plumbing.calibration import WEIGHTS, Calibration, calibration_of, planned_work
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.commands.verbs import quantize
from eqat_mm.commands.verbs.quantize import BlockAPJob, block_ap
from eqat_mm.data.image_text.settings import Conversations
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.ranks import ALONE, Ranks
from eqat_mm.runtime.sealed import read_sealed
from eqat_mm.train import block_ap as trainer
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.fit import FitConfig
from eqat_mm.train.losses import block_loss
from eqat_mm.train.modalities import PADDING, VISUAL, Modalities, equal_weights, kinds_of
from eqat_mm.train.warm_start import WarmStartConfig
from llava_adapters import arch_for
from llava_adapters.llava import ARCH as LLAVA
from llava_adapters.tiny_processor import WORDS
from tests.checkpoint.files import assert_four_lines, same_weights
from tests.thread_ranks import in_threads
from tests.tolerances import assert_close
from tests.train.results import assert_same_result, records_of
from tests.train.stopping import Stopped

CPU = torch.device("cpu")
SPEC = QuantSpec(2, 32)
FIT = FitConfig(epochs=1, batch_size=2, lr_weight=1e-3, lr_scale=1e-3, validation_samples=4)
COUNT = 12


@dataclass
class Bed:
    """A tiny model that sees, text, and conversations about images of several sizes."""

    name: str
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "full"

    @property
    def text(self) -> TextWindows:
        return TextWindows(str(self.folder / "text.txt"), length=16, count=COUNT, part="all")

    @property
    def talks(self) -> Conversations:
        return Conversations(str(self.folder / "talks.json"), max_length=500)

    def open(self) -> OpenModel:
        return open_model(self.model, arch_for(self.name))

    def found(self, share: float = 0.5) -> Calibration:
        return calibration_of(self.model, self.text, self.talks, share, self.folder / "run")

    def job(self, output: Path, **changes: Any) -> BlockAPJob:
        settings: dict[str, Any] = {"quant": SPEC, "fit": FIT, "calibration": self.text, "conversations": self.talks}
        settings |= {"model": str(self.model), "output": output, "recipe_for": (str(self.model),)}
        return BlockAPJob(**(settings | {"precision": "float32", "device": "cpu"} | changes))


def bed_of(name: str, folder: Path) -> Bed:
    arch = arch_for(name)
    assert arch.processor is not None
    model: Any = arch.tiny()[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough that every part matters
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "full")
    processor: Any = arch.processor()
    processor.save_pretrained(folder / "full")
    draw = random.Random(0)
    words = [" ".join(draw.choices(WORDS[2:40], k=40)) for _ in range(40)]
    (folder / "text.txt").write_text("\n\n".join(words), encoding="utf-8")
    records = [_record(folder, number, draw) for number in range(24)]
    (folder / "talks.json").write_text(json.dumps(records), encoding="utf-8")
    return Bed(name, folder)


def _record(folder: Path, number: int, draw: random.Random) -> dict[str, Any]:
    """One image, now and then none; questions of several lengths."""
    asked = " ".join(draw.choices(WORDS[2:40], k=1 + 4 * (number % 5)))
    record: dict[str, Any] = {"id": str(number)}
    if number % 6 != 5:
        size = (draw.choice([24, 40]), draw.choice([24, 40]))
        Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(folder / f"{number}.png")
        asked, record["image"] = f"<image>\n{asked}", f"{number}.png"
    answer = {"from": "gpt", "value": draw.choice(WORDS[2:40])}
    return record | {"conversations": [{"from": "human", "value": asked}, answer]}


@pytest.fixture(scope="module")
def beds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bed]:
    made: dict[str, Bed] = {}

    def bed(name: str) -> Bed:
        if name not in made:
            made[name] = bed_of(name, tmp_path_factory.mktemp(name))
        return made[name]

    return bed


@pytest.fixture
def bed(beds: Callable[[str], Bed]) -> Bed:
    return beds("llava")


def walker_of(bed: Bed, found: Calibration) -> BlockWalker:
    opened = bed.open()
    assert found.visual is not None
    modalities = Modalities(found.visual, equal_weights(len(opened.blocks)))
    samples = capture_front(opened, modalities.noting(found.batches), torch.float32)
    return BlockWalker(opened, samples, device=CPU, batch_tokens=200, weights=modalities.at)


# ---- what blocks are given --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_the_streams_are_the_hidden_states_of_the_model(name: str, beds: Callable[[str], Bed]) -> None:
    """Those of its own forward on the samples as they are, without any filling; called together with others."""
    bed = beds(name)
    found = bed.found()
    walker = walker_of(bed, found)
    for step in walker.walk():
        assert any(len(batch) > 1 for batch in step.batches(range(COUNT), 200))
        walker.advance_fp(step)
    model: Any = load_for_inference(bed.model, CPU, torch.float32)
    last: list[Tensor] = []
    arch_for(name).find_blocks(model)[-1].register_forward_hook(
        lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    filled = 0
    for index, batch in enumerate(found.batches):
        real = kinds_of(batch, torch.tensor([-1]))[0] != PADDING
        filled += int((~real).sum())
        length = len(real)
        model(**{key: value[:, real] if value.shape[:2] == (1, length) else value for key, value in batch.items()})
        assert_close(walker.fp.read(index)[:, real], last.pop(), "model")
    assert filled > 0


def test_samples_are_mixed_by_share(bed: Bed) -> None:
    for share, talks in ((0.25, 3), (0.5, 6), (1.0, 12), (0.001, 1)):
        found = bed.found(share)
        assert len(found.batches) == found.work.samples == COUNT
        with_mask = sum("attention_mask" in batch for batch in found.batches)
        assert with_mask == talks
    lengths = [batch["input_ids"].shape[1] for batch in bed.found().batches]
    work = bed.found().work
    assert (work.longest, work.mean) == (max(lengths), sum(lengths) / COUNT)
    seen = sum("pixel_values" in batch for batch in bed.found().batches)
    assert work.images == seen / COUNT


def test_images_are_read_once_and_not_before_the_run_begins(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(
        "eqat_mm.data.image_text.samples.read_image", lambda source: read.append(source) or Image.new("RGB", (24, 24))
    )
    found = bed.found()
    assert read == []
    walker_of(bed, found)
    assert len(read) == round(found.work.images * COUNT)


# ---- what counts -------------------------------------------------------------------------------------


def filled_otherwise(batches: list[Any]) -> list[Any]:
    """The same samples, with another token where they are filled up."""
    return [
        batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 33)}
        if "attention_mask" in batch
        else batch
        for batch in batches
    ]


@pytest.mark.parametrize(("start", "loss"), [("minmax", "mse"), ("gptq", "balanced")])
def test_what_fills_up_a_sample_decides_nothing(bed: Bed, tmp_path: Path, start: Any, loss: Any) -> None:
    found = bed.found()
    config = BlockAPConfig(SPEC, WarmStartConfig(start), replace(FIT, loss=loss), precision="float32")
    assert found.visual is not None
    for name, batches in (("one", list(found.batches)), ("other", filled_otherwise(list(found.batches)))):
        opened = bed.open()
        modalities = Modalities(found.visual, equal_weights(2))
        run_block_ap(
            opened,
            batches,
            config,
            tmp_path / name,
            device=CPU,
            source="tiny",
            provenance={"config": {}},
            modalities=modalities,
        )
    assert_same_result(tmp_path / "one", tmp_path / "other")


def test_what_counts_more_is_learned_better(bed: Bed) -> None:
    of_images, of_text = (_errors(bed, torch.tensor([[0.0, *row]] * 2)) for row in ((0.01, 1.0), (1.0, 0.01)))
    assert of_images[0] < of_text[0]
    assert of_text[1] < of_images[1]


def _errors(bed: Bed, of_kind: Tensor) -> tuple[float, float]:
    """Error of the trained first block on tokens of images and on those of text, of the samples it was trained on."""
    found = bed.found(1.0)
    assert found.visual is not None
    opened, modalities = bed.open(), Modalities(found.visual, of_kind)
    samples = capture_front(opened, modalities.noting(found.batches), torch.float32)
    walker = BlockWalker(opened, samples, device=CPU, weights=modalities.at)
    step = next(walker.walk())
    fit = replace(FIT, epochs=6, lr_weight=3e-3, lr_scale=3e-3, validation_samples=0)
    trainer.quantize_block(walker, step, BlockAPConfig(SPEC, fit=fit))
    sums = torch.zeros(2)
    for index, batch in enumerate(found.batches):
        kinds = kinds_of(batch, found.visual)
        for place, kind in enumerate((VISUAL, 3 - VISUAL)):
            weights = (kinds == kind).float()
            if weights.sum():
                error = block_loss(walker.quantized.read(index), walker.fp.read(index), weights_BT=weights)
                sums[place] += error.item()
    return sums[0].item(), sums[1].item()


def test_a_model_calibrated_with_images_understands_others_better(bed: Bed, tmp_path: Path) -> None:
    """On conversations that no calibration has seen, against the logits of the full-precision model."""
    fit = replace(FIT, epochs=4, lr_weight=2e-3)
    models = [bed.model]
    for name, talks in (("text", None), ("images", bed.talks)):
        models.append(block_ap(bed.job(tmp_path / name, conversations=talks, image_share=1.0, fit=fit)))
    talks = replace(bed.talks, source=str(_others(bed)))
    others = calibration_of(bed.model, bed.text, talks, 1.0, tmp_path / "run").batches
    wanted, of_text, of_images = (_logits(model, others) for model in models)
    assert (wanted - of_images).square().mean() < 0.9 * (wanted - of_text).square().mean()


@torch.no_grad()
def _logits(folder: Path, batches: Any) -> Tensor:
    model: Any = load_for_inference(folder, CPU, torch.float32)
    return torch.cat([model(**batch).logits[batch["attention_mask"] != 0] for batch in batches])


def _others(bed: Bed) -> Path:
    draw = random.Random(1)
    file = bed.folder / "others.json"
    file.write_text(json.dumps([_record(bed.folder, number, draw) for number in range(24, 24 + COUNT)]))
    return file


# ---- runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["equal", "gradient"])
def test_several_processes_give_the_result_of_one(bed: Bed, tmp_path: Path, weights: Any) -> None:
    found = bed.found()
    config = BlockAPConfig(
        SPEC, fit=replace(FIT, batch_size=4, loss="balanced"), precision="float32", token_weights=weights
    )
    opened = [bed.open() for _ in range(3)]

    def work(ranks: Ranks) -> None:
        model, folder = opened[ranks.rank + (ranks.world > 1)], tmp_path / str(ranks.world)
        folder.mkdir(exist_ok=True)
        modalities = calibration.modalities_of(model, found, config, folder, CPU, ranks)
        options: dict[str, Any] = {"device": CPU, "source": "tiny", "provenance": {"config": {}}}
        run_block_ap(model, found.batches, config, folder, modalities=modalities, ranks=ranks, **options)

    work(ALONE)
    in_threads(2, work)
    assert_same_result(tmp_path / "1", tmp_path / "2")


def test_a_killed_run_goes_on_with_the_weights_it_began_with(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = block_ap(bed.job(tmp_path / "whole", token_weights="gradient"))
    plain, done = trainer.quantize_block, 0

    def stopping(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 2:
            raise Stopped
        return plain(*args)

    monkeypatch.setattr(trainer, "quantize_block", stopping)
    with pytest.raises(Stopped):
        block_ap(bed.job(tmp_path / "killed", token_weights="gradient"))
    monkeypatch.setattr(trainer, "quantize_block", plain)
    said = read_sealed(tmp_path / "killed" / WEIGHTS)["of_kind"]
    assert [row[:2] for row in said] == [[0.0, 1.0]] * 2
    assert 0 < said[0][2] < 10
    assert said[1][2] == 0  # nothing looks at what the last block gives at an image
    monkeypatch.setattr(calibration, "gradient_weights", None)  # not computed again
    assert same_weights(whole, block_ap(bed.job(tmp_path / "killed", token_weights="gradient")))


def test_other_conversations_or_shares_are_another_run(bed: Bed, tmp_path: Path) -> None:
    block_ap(bed.job(tmp_path))
    for changes in ({"image_share": 0.75}, {"conversations": None}, {"token_weights": "gradient"}):
        with pytest.raises(ConfigError, match="as the run in this folder was started"):
            block_ap(bed.job(tmp_path, **changes))


def test_text_alone_is_what_it_was(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(quantize, "run_block_ap", lambda *args, **kwargs: given.append((args, kwargs)))
    monkeypatch.setattr(quantize.Run, "finish", lambda run: None)
    block_ap(bed.job(tmp_path, conversations=None))
    (_, batches, *_), options = given[0]
    assert [list(batch) for batch in batches] == [["input_ids"]] * COUNT
    assert options["modalities"] is None


def test_the_checkpoint_keeps_how_it_was_addressed(bed: Bed, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% for p in m.content %}{{ p.get('text', '<image>') }} {% endfor %}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    talks = replace(bed.talks, template=str(tmp_path / "mine.jinja"))
    made = block_ap(bed.job(tmp_path / "run", conversations=talks, fit=replace(FIT, epochs=0)))
    assert (made / "chat_template.jinja").read_text() == template


# ---- what a user types -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*these settings are")
def test_the_command_line(bed: Bed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["block-ap", str(bed.model), "--output", str(tmp_path / "run"), "--quant.group_size", "32"]
    words += ["--conversations.source", bed.talks.source, "--image_folder", str(bed.folder), "--image_share", "1"]
    assert main([*words, "--calibration.count", "8", "--fit.epochs", "0", "--fit.validation_samples", "0"]) == 0
    assert "8 conversations" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "eqat.json").is_file()


def test_weights_need_two_kinds_of_tokens(bed: Bed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all tokens are text") as raised:
        bed.job(tmp_path, conversations=None, token_weights="gradient")
    assert_four_lines(raised.value)


def test_text_is_asked_for_unless_there_is_none(bed: Bed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--calibration\.source"):
        block_ap(bed.job(tmp_path, calibration=TextWindows(count=8)))
    with pytest.raises(ConfigError, match=r"--calibration\.count") as raised:
        block_ap(bed.job(tmp_path, calibration=replace(bed.text, count=None)))
    assert_four_lines(raised.value)
    with pytest.raises(DataError, match="lower --image_share"):
        block_ap(bed.job(tmp_path, calibration=TextWindows(count=30), image_share=1.0))
    assert not tmp_path.joinpath("run.json").exists()


def test_the_plan_knows_images(bed: Bed) -> None:
    shape = model_shape(str(bed.model))
    work = planned_work(shape, bed.text, bed.talks, 0.25)
    assert (work.samples, work.longest, work.images) == (COUNT, 500, 0.25)
    assert planned_work(shape, bed.text, None, 0.25).images == 0


# ---- towers with cross-attention ---------------------------------------------------------------------


@torch.no_grad()
def test_blocks_that_look_at_images_are_reached(tmp_path: Path) -> None:
    """A tiny Mllama, which no adapter serves: blocks are called with what its vision tower says of each sample."""
    model = _mllama()
    model.save_pretrained(tmp_path / "full")
    cross = (("cross_attn.q_proj",), ("cross_attn.k_proj", "cross_attn.v_proj"), ("cross_attn.o_proj",))
    parts = tuple("model.vision_model" if each == "model.vision_tower" else each for each in LLAVA.full_precision)
    arch = replace(LLAVA, name="mllama", stages=(*LLAVA.stages, *cross), sums=(), norms=(), full_precision=parts)
    opened = open_model(tmp_path / "full", arch)
    draw = torch.Generator().manual_seed(0)
    batches = [_mllama_inputs(draw) for _ in range(4)]
    last: list[Tensor] = []
    with arch.find_blocks(model)[-1].register_forward_hook(lambda module, args, output: last.append(output)):
        for batch in batches:
            model(**batch)
    walker = BlockWalker(opened, capture_front(opened, batches, torch.float32), device=CPU)
    for step in walker.walk():
        walker.advance_fp(step)
    assert all(torch.equal(walker.fp.read(index), own) for index, own in enumerate(last))
    fit = replace(FIT, lr_weight=1e-4, lr_scale=1e-4, epochs=2, validation_samples=0)
    config = BlockAPConfig(SPEC, fit=fit, precision="float32")
    modalities = Modalities(torch.tensor([96]), equal_weights(2))
    options: dict[str, Any] = {"device": CPU, "source": "tiny", "provenance": {"config": {}}, "modalities": modalities}
    with torch.enable_grad():
        manifest = run_block_ap(open_model(tmp_path / "full", arch), batches, config, tmp_path / "run", **options)
    assert manifest.stage == "block-ap"
    losses = [(record["loss_before"], record["loss_after"]) for record in records_of(tmp_path / "run")]
    assert all(after < before for before, after in losses)


def _mllama() -> Any:
    text = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1], "bos_token_id": 1}
    text |= {"eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4}
    vision |= {"intermediate_size": 48, "image_size": 16, "patch_size": 8, "max_num_tiles": 2}
    vision |= {"intermediate_layers_indices": [0], "vision_output_dim": 64, "supported_aspect_ratios": [[1, 1], [1, 2]]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=96)
        model = transformers.MllamaForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "gate" in name:  # closed at first: nothing would be seen
                torch.nn.init.normal_(parameter, mean=0.3 if "gate" in name else 0.0, std=0.1)
    return model


def _mllama_inputs(draw: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (1, 12), generator=draw)
    ids[0, 1] = 96
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "aspect_ratio_ids": torch.tensor([[1]])}
    inputs |= {"pixel_values": torch.randn(1, 1, 2, 3, 16, 16, generator=draw)}
    return inputs | {
        "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        "cross_attention_mask": torch.ones(1, 12, 1, 2, dtype=torch.long),
    }
