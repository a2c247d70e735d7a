"""Samples are checked before they are used; all problems come together; a tiny LLaVA takes the batches."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from eqat_mm.data import image_text as module
from eqat_mm.data.batching import Collator
from eqat_mm.data.chat import IGNORED
from eqat_mm.data.image_text import ImageTextData, image_text_data
from eqat_mm.errors import ConfigError, DataError
from llava_adapters.tiny import tiny_config, tiny_vision_config
from tests.data.tiny_processor import SIDE, TILES, llava_next_processor, llava_processor
from tests.tolerances import assert_close

SIZES = {"a.png": (28, 28), "b.png": (90, 30), "c.png": (20, 50)}


def record(question: str, answer: str, image: Any = None) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({} if image is None else {"image": image})}


GOOD = [
    record("<image>\nwhat is it?", "a red cat", "a.png"),
    record("is it big?", "yes"),
    record("<image> or <image>?", "no", ["b.png", "c.png"]),
    record("<image>", "a cat, a big red cat", "c.png"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of images; write the records with `given`."""
    for seed, (name, size) in enumerate(SIZES.items()):
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
        Image.fromarray(noise.byte().numpy()).save(tmp_path / name)
    return tmp_path / "records.json"


def given(source: Path, records: list[Any], **options: Any) -> ImageTextData:
    source.write_text(json.dumps(records), encoding="utf-8")
    return ImageTextData(source=str(source), **options)


def test_an_item_is_a_sample(source: Path) -> None:
    data = image_text_data(llava_processor(), given(source, GOOD))
    assert len(data) == 4
    assert data.text_only == [False, True, False, False]
    for index, (images, length) in enumerate(zip((1, 0, 2, 1), data.lengths, strict=True)):
        sample = data[index]
        assert sample["input_ids"].shape == sample["labels"].shape == (length,)
        assert (sample["labels"] != IGNORED).any()
        assert set(sample) == {"input_ids", "labels", *(["pixel_values"] if images else [])}
        if images:
            assert sample["pixel_values"].shape == (images, 3, SIDE, SIDE)


def test_llava_next_has_sizes_and_tiles(source: Path) -> None:
    data = image_text_data(llava_next_processor(), given(source, GOOD))
    sample = data[2]
    assert sample["image_sizes"].tolist() == [[30, 90], [50, 20]]
    assert sample["pixel_values"].shape[0] == 2
    assert [len(data[index]["input_ids"]) for index in range(4)] == data.lengths


BAD = [
    record("<image>", "yes", "gone.png"),
    record("<image>", "yes", "broken.png"),
    record("<image>", "yes", "../a.png"),
    record("what?", "yes", "a.png"),
    record("what?", " "),
    record("what? " * 40, "yes"),
    {"conversations": [{"from": "human", "value": "a"}, {"from": "alien", "value": "b"}]},
]
PROBLEMS = [
    "record 0: image {folder}/gone.png is missing",
    "record 1: image {folder}/broken.png is unreadable",
    "record 2: the path ../a.png leaves the image folder {folder}",
    "record 3: 0 <image> in the text for 1 images",
    "record 4: empty answer in turn 2",
    "record 5: {length} tokens, more than max_length (60)",
    "record 6: unknown speaker 'alien' in turn 2",
]


def test_all_problems_are_reported_together(source: Path) -> None:
    (source.parent / "broken.png").write_bytes(b"no image")
    length = image_text_data(llava_processor(), given(source, [BAD[5]])).lengths[0]
    with pytest.raises(DataError) as caught:
        image_text_data(llava_processor(), given(source, BAD + GOOD, max_length=60))
    head, *lines = caught.value.given.splitlines()
    assert head == "7 bad samples of 11:"
    for line, problem in zip(lines, PROBLEMS, strict=True):
        assert f"{source}, {problem.format(folder=source.parent, length=length)}" in line
    assert caught.value.where == str(source)


def test_only_the_first_ten_problems_are_listed(source: Path) -> None:
    with pytest.raises(DataError) as caught:
        image_text_data(llava_processor(), given(source, [record("a", "")] * 1234))
    head, *lines = caught.value.given.splitlines()
    assert head == "1,234 bad samples of 1,234:"
    assert len(lines) == 11
    assert "record 9:" in lines[9]
    assert lines[10].strip() == "and 1,224 more"


def test_bad_samples_can_be_skipped(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [GOOD[0], BAD[0], GOOD[1], BAD[4]]
    data = image_text_data(llava_processor(), given(source, mixed, on_bad_sample="skip"))
    assert data.text_only == [False, True]
    said = capsys.readouterr().out
    assert "2 of 4 samples are skipped" in said
    assert "record 1: image" in said
    assert "record 3: empty answer" in said
    with pytest.raises(DataError, match="at least one sample that can be used"):
        image_text_data(llava_processor(), given(source, BAD[:1], on_bad_sample="skip"))


def test_an_image_that_breaks_later_is_named_with_its_record(source: Path) -> None:
    path = source.parent / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    data = image_text_data(llava_processor(), given(source, [GOOD[1], record("<image>", "yes", "cut.jpg")]))
    with pytest.raises(DataError, match=r"cut\.jpg is unreadable") as caught:
        data[1]
    assert caught.value.where == f"{source}, record 1"


def test_a_count_draws_records_by_seed(source: Path) -> None:
    records = [record("what?", "yes " * (1 + index)) for index in range(30)]
    whole = image_text_data(llava_processor(), given(source, records)).lengths
    drawn = [
        image_text_data(llava_processor(), given(source, records, count=10, seed=seed)).lengths for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 10
    assert set(drawn[0]) < set(whole)
    assert drawn[0] == sorted(drawn[0])  # in the stored order
    with pytest.raises(DataError, match="30 records"):
        image_text_data(llava_processor(), given(source, records, count=31))


def test_the_digest_follows_the_samples(source: Path) -> None:
    def digest(records: list[Any]) -> str:
        return image_text_data(llava_processor(), given(source, records)).digest()

    assert digest(GOOD) == digest(GOOD)
    changed = [[*GOOD[:3], record("<image>", "a dog", "c.png")], GOOD[:3], [*GOOD[:3], {**GOOD[3], "image": "a.png"}]]
    assert len({digest(records) for records in (GOOD, *changed)}) == 4


def test_a_data_set_can_be_sent_to_a_worker(source: Path) -> None:
    data = image_text_data(llava_processor(), given(source, GOOD))
    copy = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(value, copy[0][name]) for name, value in data[0].items())


def test_the_demo_is_its_training_questions(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source.parent / "train.json").write_text(json.dumps(GOOD))
    monkeypatch.setattr(module, "easy_vqa_folder", lambda: source.parent)
    assert ImageTextData().source == "demo-easy-vqa"
    assert len(image_text_data(llava_processor(), ImageTextData())) == 4


@pytest.mark.parametrize("package", ["PIL", "torchvision"])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else "there")
    with pytest.raises(ConfigError, match=f"pip install {'pillow' if package == 'PIL' else package}"):
        image_text_data(llava_processor(), ImageTextData())


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"max_length": 0}, {"text_warmup_steps": -1}, {"on_bad_sample": "ignore"}], ids=str
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ImageTextData(**wrong)


# ---- in a model -----------------------------------------------------------------------------------


def _model(processor: Any, kind: str) -> Any:
    text, vision = tiny_config("llama", vocab_size=len(processor.tokenizer)), tiny_vision_config(SIDE, 14)
    tiles = {"image_grid_pinpoints": TILES} if kind == "llava_next" else {}
    config = transformers.AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, image_token_index=processor.image_token_id, **tiles
    )
    return transformers.AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("kind", "make"), [("llava", llava_processor), ("llava_next", llava_next_processor)], ids=["llava", "llava-next"]
)
def test_a_batch_gives_what_its_samples_give(source: Path, kind: str, make: Any, side: str) -> None:
    processor = make()
    data = image_text_data(processor, given(source, GOOD))
    model = _model(processor, kind)
    batch = Collator(processor.tokenizer, side)([data[index] for index in range(len(data))])
    assert batch["input_ids"].shape == batch["labels"].shape == (4, max(data.lengths))
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        for index in range(len(data)):
            sample = Collator(processor.tokenizer)([data[index]])
            present = batch["attention_mask"][index].bool()
            assert torch.equal(labels[index][present], sample["labels"][0])
            alone = model(**{name: value for name, value in sample.items() if name != "labels"}).logits
            assert_close(together[index][present], alone[0], "model")


def test_a_batch_without_images_has_none(source: Path) -> None:
    processor = llava_processor()
    data = image_text_data(processor, given(source, [GOOD[1]]))
    assert set(Collator(processor.tokenizer)([data[0], data[0]])) == {"input_ids", "attention_mask", "labels"}
