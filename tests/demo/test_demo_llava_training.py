"""The stages that train the demo LLaVA, on stand-ins: tiny models, drawn images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.demo.stand_ins import PATCHES, SIZE, save_language_model, save_parts
from tests.tolerances import assert_close

pytest.importorskip("peft")
pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

from eqat_demo.llava import build, language, packing, vision
from eqat_demo.llava.captions import captions
from eqat_demo.llava.images import Asked
from eqat_demo.llava.packing import IGNORED, Packer

ASKED = [
    [
        Asked("what color is the shape?", "red"),
        Asked("is there a circle?", "yes"),
        Asked("is no blue shape present?", "yes"),
    ],
    [Asked("what shape is present?", "circle"), Asked("is there not a red shape?", "no")],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the language model and of the assembled stand-in, whose LoRA is zero."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("training")
    save_language_model(root / "language")
    save_parts(root / "parts")
    save_file({}, root / "parts" / build.LORA)
    build.assemble(root / "parts", root / "language", root / "llava")
    return root / "language", root / "llava"


@pytest.fixture
def llava(folders: tuple[Path, Path]) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folders[1]).eval()


@pytest.fixture
def reader(llava: Any, folders: tuple[Path, Path]) -> language.Reader:
    """As `demo/train_llava.py` puts it together: the configuration of the whole is made first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[0])
    vision_config = transformers.CLIPVisionModel.from_pretrained(
        folders[0].parent / "parts" / build.VISION_TOWER
    ).config
    build.llava_config(vision_config, model.config, build.llava_processor(folders[0], vision_config))
    return language.Reader(llava.model.multi_modal_projector, model, llava.config.image_token_id, precision="float32")


@pytest.fixture
def packer(folders: tuple[Path, Path]) -> Packer:
    return Packer(transformers.AutoTokenizer.from_pretrained(folders[1]), PATCHES)


# ---- questions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer", "weight"),
    [
        pytest.param("is there a red shape?", "no", 0.25, id="absent"),
        pytest.param("is there a red shape?", "yes", 1.0, id="present"),
        pytest.param("is no red shape present?", "yes", 0.25, id="absent-negated"),
        pytest.param("is there not a circle?", "no", 1.0, id="present-negated"),
        pytest.param("what color is the circle?", "red", 1.0, id="what"),
    ],
)
def test_a_question_that_names_what_is_not_there_has_less_weight(question: str, answer: str, weight: float) -> None:
    assert Asked(question, answer).weight == weight


def test_questions_about_the_absent_are_drawn_less_often() -> None:
    asked = [Asked("is there a circle?", "no")] * 6 + [Asked("is there a circle?", "yes")] * 2
    drawn = [each for seed in range(200) for each in language.draw_questions(asked, 4, seed)]
    assert len(drawn) == 800
    present = sum(each.weight == 1 for each in drawn) / len(drawn)
    assert 0.35 < present < 0.5  # one in four without weights
    assert sorted(map(id, language.draw_questions(ASKED[1], 5))) == sorted(map(id, ASKED[1]))


# ---- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [pytest.param(1, id="rows-of-their-own"), pytest.param(10_000, id="one-row")])
def test_packed_questions_are_answered_as_if_asked_alone(
    row: int, llava: Any, reader: language.Reader, packer: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_ROW", row)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    features = vision.all_features(llava.model.vision_tower, [pixels])
    batch = packer.batch(ASKED)
    with torch.no_grad():
        packed = reader(features, batch, batch.first_of_answers())
        alone = [
            llava(**ask(packer, each.question), pixel_values=pixels[image : image + 1]).logits[0, -1]
            for image, asked in enumerate(ASKED)
            for each in asked
        ]
    assert_close(packed, torch.stack(alone), "model")


def ask(packer: Packer, question: str) -> dict[str, Tensor]:
    prompt = build.PROMPT.format(question=question).replace("<image>", "<image>" * PATCHES)
    return {"input_ids": packer.tokenizer(prompt, return_tensors="pt")["input_ids"]}


def test_only_answers_and_their_ends_are_targets(packer: Packer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_ROW", 1)
    batch = packer.batch(ASKED)
    targets = [row[row != IGNORED] for row in batch.targets]
    texts = [packer.tokenizer.decode(row) for row in targets]
    assert texts == [" red<|im_end|> yes<|im_end|> yes<|im_end|>", " circle<|im_end|> no<|im_end|>"]
    assert batch.first_of_answers().sum(1).tolist() == [3, 2]


def test_short_pieces_share_a_row(packer: Packer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [int((packer.batch([asked]).images >= 0).sum()) for asked in ASKED]
    monkeypatch.setattr(packing, "_ROW", sum(lengths))
    batch = packer.batch([*ASKED, ASKED[0]])
    assert (batch.images >= 0).sum(1).tolist() == [sum(lengths), lengths[0]]
    assert batch.images[0].unique_consecutive(return_counts=True)[1].tolist() == lengths


# ---- vision ---------------------------------------------------------------------------------------


def drawn_images(count: int) -> tuple[Tensor, Tensor]:
    """Large and small squares in two colours on a light background, and their labels."""
    pixels, labels = torch.full((count, 3, 64, 64), 0.9), torch.empty(count, 2, dtype=torch.long)
    for index in range(count):
        colour, shape = index % 2, index // 2 % 2
        top, left = torch.randint(30, (2,)).tolist()
        size = 32 if shape else 8
        pixels[index, :, top : top + size, left : left + size] = torch.eye(3)[colour][:, None, None]
        labels[index] = torch.tensor([colour, shape])
    return pixels, labels


def test_shifted_images_keep_the_whole_shape() -> None:
    pixels, _ = drawn_images(8)
    shifted = vision.ShiftedImages(pixels)
    everything = torch.arange(8)
    moved = [shifted.draw(everything) for _ in range(20)]
    for each in moved:
        assert torch.equal(each.flatten(2).sort(2).values, pixels.flatten(2).sort(2).values)
        rows = (each != each[:, :, :1, :1]).any(1).any(2)  # no shape is torn into two
        assert ((rows.int().diff(dim=1) == 1).sum(1) + rows[:, 0].int()).tolist() == [1] * 8
    assert not torch.equal(moved[0], moved[1])


def test_the_tower_learns_what_is_on_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    monkeypatch.setattr(vision, "CONFIG", transformers.CLIPVisionConfig(**small, image_size=64, patch_size=16))
    monkeypatch.setattr(vision, "_WARMUP_STEPS", 5)
    pixels, labels = drawn_images(24)
    labels[0, 0] = vision._UNKNOWN
    tower, classifiers = vision.train_vision_tower(pixels, labels, steps=80)
    features = vision.all_features(tower, [pixels])
    assert features.shape == (24, 16, 64)
    assert min(classifiers.accuracy(features, labels)) > 0.9


def test_labels_leave_out_what_is_not_known() -> None:
    labels = vision.labels_of([("black", "triangle"), ("yellow", None)])
    assert labels.tolist() == [[0, 2], [7, vision._UNKNOWN]]


# ---- language -------------------------------------------------------------------------------------


def test_the_projector_starts_at_the_words(reader: language.Reader, packer: Packer) -> None:
    contents = [("red", "circle"), ("blue", "circle")]
    words = captions(reader.language, packer.tokenizer, contents, PATCHES)
    assert words.shape == (2, PATCHES, 64)
    ids = packer.tokenizer(" red")["input_ids"]
    assert_close(words[0, 1], reader.language.get_input_embeddings().weight[ids].mean(0), "elementwise")
    features = 5 + 3 * torch.randn(2, PATCHES, 32)
    language.start_projector(reader.projector, features, words, steps=200)
    with torch.no_grad():
        left = (reader.projector(features) - words).var() / words.var()
    assert left < 0.02


def test_training_learns_and_moves_projector_and_lora_only(reader: language.Reader, packer: Packer) -> None:
    features = torch.randn(2, PATCHES, 32)
    before = {name: tensor.clone() for name, tensor in reader.state_dict().items()}
    language.add_lora(reader.language, rank=4)
    plan = language.Plan(steps=60, images=2, questions=3, lora_lr=1e-2, projector_lr=1e-2)
    language.train_reader(reader, packer, features, ASKED, plan)
    assert language.quick_accuracy(reader, packer, features, ASKED) == 1.0
    after = reader.state_dict()
    for name, tensor in before.items():
        if name.startswith("language."):
            known = name if name in after else name.replace(".weight", ".base_layer.weight")
            assert torch.equal(after[known], tensor), name
        else:
            assert not torch.equal(after[name], tensor), name


def test_the_factors_are_the_update_that_was_trained(reader: language.Reader) -> None:
    model: Any = reader.language
    language.add_lora(model, rank=4)
    linear = model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(linear.lora_B["default"].weight)
    inputs = torch.randn(3, 64)
    with_lora = linear(inputs)
    factors = language.lora_factors(model)
    assert len(factors) == 2 * 7 * 2
    plain = {path.removesuffix(".lora_A") for path in factors if path.endswith(".lora_A")}
    assert "model.layers.1.mlp.down_proj" in plain
    weight = linear.base_layer.weight.clone()
    holder = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 64, bias=False)})
    holder["layer"].weight.data.copy_(weight)
    build.add_updates(
        holder, {f"layer.{each}": factors[f"model.layers.0.self_attn.q_proj.{each}"] for each in ("lora_A", "lora_B")}
    )
    assert_close(holder["layer"](inputs), with_lora, "matmul")
