"""Samples are checked before they are used; all problems come together; a tiny LLaVA takes the batches."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from eqat_demo import easy_vqa
from eqat_mm.data.image_text import preparing, spread
from eqat_mm.data.image_text import samples as module
from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.chat import IGNORED, Chat
from eqat_mm.data.image_text.images import FORMATS, image_size
from eqat_mm.data.image_text.kept import Kept
from eqat_mm.data.image_text.problems import MissingImage, TooLong, say_late
from eqat_mm.data.image_text.samples import image_text_data
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.errors import ConfigError, DataError
from llava_adapters.tiny import tiny_config, tiny_vision_config
from tests.data.tiny_processor import MARKED, SIDE, TILES, llava_next_processor, llava_processor
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
        assert set(sample) == {"input_ids", "attention_mask", "labels", *(["pixel_values"] if images else [])}
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
    record("<image>", "yes", ["a.png", "b.png"]),
    record("what?", " "),
    record("what? " * 40, "yes"),
    {"conversations": [{"from": "human", "value": "a"}, {"from": "alien", "value": "b"}]},
]
PROBLEMS = """\
    4 not in the format:
        {source}, record 2: the path ../a.png leaves the image folder {folder}
        {source}, record 3: 1 <image> in the text for 2 images
        {source}, record 4: empty answer in turn 2
        {source}, record 6: unknown speaker 'alien' in turn 2 (known: human, gpt, system, user, assistant)
    1 image missing:
        {source}, record 0: image {folder}/gone.png is missing
    1 image unreadable:
        {source}, record 1: image {folder}/broken.png is unreadable (none of {formats})
    1 too long:
        {source}, record 5: {length} tokens, more than max_length (60); cut, no answer is left, or no whole image"""


def test_all_problems_are_reported_together_by_their_kind(source: Path) -> None:
    folder = source.parent
    (folder / "broken.png").write_bytes(b"no image")
    length = image_text_data(llava_processor(), given(source, [BAD[5]])).lengths[0]
    with pytest.raises(DataError) as caught:
        image_text_data(llava_processor(), given(source, BAD + GOOD, max_length=60))
    problems = PROBLEMS.format(source=source, folder=folder, length=length, formats=", ".join(FORMATS))
    assert caught.value.given == f"7 bad samples of 11:\n{problems}"
    assert caught.value.where == str(source)


def test_only_the_first_ten_of_a_kind_are_shown_but_all_are_listed(source: Path) -> None:
    file = source.parent / "runs" / "problems.jsonl"
    with pytest.raises(DataError) as caught:
        image_text_data(llava_processor(), given(source, [record("a", "")] * 1234), file)
    head, kind, *lines = caught.value.given.splitlines()
    assert (head, kind.strip()) == ("1,234 bad samples of 1,234:", "1,234 not in the format:")
    assert len(lines) == 12
    assert "record 9:" in lines[9]
    assert lines[10].strip() == "and 1,224 more"
    assert lines[11].strip() == f"all are listed in {file}"
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["where"] for line in listed] == [f"{source}, record {index}" for index in range(1234)]
    assert listed[7] == {
        "kind": "not in the format",
        "where": f"{source}, record 7",
        "problem": "empty answer in turn 2",
    }


def test_a_list_of_before_does_not_stay(source: Path) -> None:
    file = source.parent / "problems.jsonl"
    image_text_data(llava_processor(), given(source, [*GOOD, BAD[4]], on_bad_sample="skip"), file)
    assert file.is_file()
    image_text_data(llava_processor(), given(source, GOOD), file)
    assert not file.exists()


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


@pytest.mark.parametrize(
    ("bad", "options", "do"),
    [
        (record("<image>", "yes", "gone.png"), {}, MissingImage.do),
        (record("what? " * 40, "yes"), {"max_length": 60}, TooLong.do),
    ],
    ids=["missing", "too-long"],
)
def test_skip_does_not_hide_that_much_is_wrong(source: Path, bad: Any, options: Any, do: str) -> None:
    mixed = [GOOD[1]] * 88 + [bad] * 11 + [BAD[4]]
    with pytest.raises(DataError) as caught:
        image_text_data(llava_processor(), given(source, mixed, on_bad_sample="skip", **options))
    assert "12 bad samples of 100:" in caught.value.given
    assert caught.value.allowed == "bad samples up to a share of 0.1, or up to 10"
    assert caught.value.do.startswith(do)
    share = caught.value.do.rpartition("--conversations.max_skipped ")[2]
    config = given(source, mixed, on_bad_sample="skip", max_skipped=float(share), **options)
    assert len(image_text_data(llava_processor(), config)) == 88


def test_a_wrong_image_folder_is_noticed_early(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(preparing, "image_size", lambda image: looked.append(image) or image_size(image))
    monkeypatch.setattr(spread, "FEW", 2**20)  # in this process
    gone = [record("<image>", "yes", f"{index}.png") for index in range(3000)]
    for how in ("error", "skip"):
        with pytest.raises(DataError, match="images are all missing") as caught:
            image_text_data(llava_processor(), given(source, [GOOD[1], *gone], on_bad_sample=how))
        assert "--conversations.image_folder" in caught.value.do
    assert len(looked) < 3000
    found = image_text_data(llava_processor(), given(source, [GOOD[0], *gone], on_bad_sample="skip", max_skipped=1))
    assert len(found) == 1


# ---- what a sample can do when its turn comes ------------------------------------------------------


def cut_jpeg(folder: Path) -> str:
    path = folder / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    return path.name


def test_an_image_that_breaks_later_is_named_with_its_record(source: Path) -> None:
    late = record("<image>", "yes", cut_jpeg(source.parent))
    data = image_text_data(llava_processor(), given(source, [GOOD[1], late, GOOD[0]]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"cut\.jpg is unreadable") as caught:
            data[1]
    assert caught.value.where == f"{source}, record 1"
    assert "--conversations.on_bad_sample skip" in caught.value.do


def test_it_is_found_before_where_images_are_decoded(source: Path) -> None:
    late = record("<image>", "yes", cut_jpeg(source.parent))
    with pytest.raises(DataError, match=r"cut\.jpg is unreadable"):
        image_text_data(llava_processor(), given(source, [GOOD[1], late], check="decode"))


def test_the_data_are_the_same_whatever_becomes_of_bad_samples(source: Path) -> None:
    records = [*GOOD, record("<image>", "yes", cut_jpeg(source.parent))]
    digests = [
        image_text_data(llava_processor(), given(source, records, on_bad_sample=how)) for how in ("error", "skip")
    ]
    assert digests[0].digest() == digests[1].digest()


def test_another_sample_of_its_kind_stands_in(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = source.parent / "problems.jsonl"
    late = record("<image>", "yes", cut_jpeg(source.parent))
    config = given(source, [GOOD[0], GOOD[1], late, GOOD[1], GOOD[3], late], on_bad_sample="skip")
    data = image_text_data(llava_processor(), config, file)
    assert len(data) == 6
    for bad, other in ((2, 4), (5, 0)):  # the next with images, from the beginning after the last
        for name, value in data[bad].items():
            assert torch.equal(value, data[other][name])
    said = capsys.readouterr().out
    assert said.count("stands in") == 1
    assert f"{source}, record 2: image {source.parent}/cut.jpg is unreadable" in said
    again = image_text_data(llava_processor(), config)  # as another process, or a run that is continued
    assert all(torch.equal(value, again[5][name]) for name, value in data[5].items())
    say_late(file)
    assert "2 that could not be used: 2 image unreadable" in capsys.readouterr().out
    assert [json.loads(line)["where"] for line in file.read_text().splitlines()] == [
        f"{source}, record {index}" for index in (2, 5)
    ]


def test_too_many_late_problems_end_a_run(source: Path) -> None:
    late = record("<image>", "yes", cut_jpeg(source.parent))
    data = image_text_data(llava_processor(), given(source, [late] * 12 + [GOOD[0]] * 20, on_bad_sample="skip"))
    with pytest.raises(DataError, match="11 bad samples of 32"):
        data[0]
    alone = image_text_data(llava_processor(), given(source, [late, GOOD[1]], on_bad_sample="skip"))
    with pytest.raises(DataError, match="no sample with images can be used any more"):
        alone[0]


def test_what_a_processor_raises_is_a_bad_sample(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(chat: Chat, conversation: Any, images: list[Any]) -> Any:
        if conversation.turns[1].text == "no":
            raise ZeroDivisionError("an image too thin")
        return encoded(chat, conversation, images)

    encoded = Chat.encode
    monkeypatch.setattr(Chat, "encode", encode)
    data = image_text_data(llava_processor(), given(source, GOOD))
    with pytest.raises(DataError, match="an image too thin") as caught:
        data[2]
    assert caught.value.where == f"{source}, record 2"
    skipping = image_text_data(llava_processor(), given(source, GOOD, on_bad_sample="skip"))
    assert torch.equal(skipping[2]["input_ids"], data[3]["input_ids"])


def test_one_sample_that_cannot_be_counted_is_one_bad_sample(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(chat: Chat, texts: list[str], sizes: Any) -> list[int]:
        if any(size == (30, 90) for each in sizes for size in each):
            raise ValueError("aspect ratio")
        return counted(chat, texts, sizes)

    counted = Chat.lengths
    monkeypatch.setattr(Chat, "lengths", lengths)
    data = image_text_data(llava_processor(), given(source, GOOD, on_bad_sample="skip"))
    assert data.text_only == [False, True, False]


def test_what_is_far_too_long_is_not_tokenized(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    rendered = Chat.text
    monkeypatch.setattr(Chat, "text", lambda chat, each: texts.append(each.where) or rendered(chat, each))
    monkeypatch.setattr(preparing, "_identity", lambda chat: 0)
    turns = [{"from": who, "value": "a"} for who in ("human", "gpt")]
    long = [record("a" * 20_000, "b"), {"conversations": turns * 40}, record("<image>" * 71, "b", ["a.png"] * 71)]
    data = image_text_data(llava_processor(), given(source, [GOOD[1], *long], max_length=70, on_bad_sample="skip"))
    assert len(data) == len(texts) == 1


# ---- what is too long -----------------------------------------------------------------------------


LONG = record("<image>\nwhat is it?", "a red cat " * 40, "a.png")


def test_what_is_too_long_is_cut_as_llava_cuts_it(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = image_text_data(llava_processor(), given(source, [LONG, GOOD[1]]))
    cut = image_text_data(llava_processor(), given(source, [LONG, GOOD[1]], max_length=50))
    assert "1 longer than max_length (50), cut" in capsys.readouterr().out
    assert cut.lengths == [50, whole.lengths[1]]
    for name in ("input_ids", "labels"):
        assert torch.equal(cut[0][name], whole[0][name][:50])
        assert torch.equal(cut[1][name], whole[1][name])
    assert torch.equal(cut[0]["pixel_values"], whole[0]["pixel_values"])


@pytest.mark.parametrize(
    "uncut",
    [
        record("<image>\n" + "what? " * 60, "yes", "a.png"),
        {**record("what?", "yes " * 60), "image": "a.png"},
        record("what? " * 60 + "<image>", "yes", "a.png"),
    ],
    ids=["question", "answer", "image"],
)
def test_no_image_and_no_answer_is_cut_off(source: Path, uncut: Any) -> None:
    if uncut["conversations"][0]["value"] == "what?":
        uncut["conversations"] += record("<image>", "no")["conversations"]
    with pytest.raises(DataError, match="cut, no answer is left") as caught:
        image_text_data(llava_processor(MARKED), given(source, [GOOD[1], uncut], max_length=60))
    assert caught.value.do.startswith(TooLong.do)
    found = image_text_data(
        llava_processor(MARKED), given(source, [GOOD[1], uncut], max_length=60, on_bad_sample="skip")
    )
    assert len(found) == 1


def test_every_length_is_cut_or_refused_and_nothing_else(source: Path) -> None:
    talk = record("<image>\nwhat is it?", "a red cat", "a.png")
    talk["conversations"] += record("is it big?", "yes, a big one")["conversations"]
    whole = image_text_data(llava_processor(), given(source, [talk]))[0]
    answer = int((whole["labels"] != IGNORED).nonzero()[0])
    for most in range(1, len(whole["labels"]) + 2):
        try:
            data = image_text_data(llava_processor(), given(source, [talk], max_length=most))
        except DataError:
            assert most <= answer + 1
        else:
            assert most > answer
            assert torch.equal(data[0]["labels"], whole["labels"][:most])


@pytest.mark.parametrize(("how", "others"), [("skip", "error"), ("error", "skip")])
def test_what_is_too_long_has_a_setting_of_its_own(source: Path, how: Any, others: Any) -> None:
    options = {"too_long": how, "on_bad_sample": others, "max_length": 50}
    config = given(source, [LONG, GOOD[1]], **options)
    if how == "skip":
        assert len(image_text_data(llava_processor(), config)) == 1
        return
    with pytest.raises(DataError, match="more than max_length") as caught:
        image_text_data(llava_processor(), config)
    assert "too_long truncate" in caught.value.do
    assert caught.value.do.endswith("or leave them out: --conversations.too_long skip")


def test_the_setting_for_too_long_excuses_nothing_else(source: Path) -> None:
    with pytest.raises(DataError, match="2 bad samples of 3") as caught:
        image_text_data(llava_processor(), given(source, [LONG, GOOD[1], BAD[4]], max_length=50, too_long="skip"))
    assert caught.value.do.endswith("--conversations.on_bad_sample skip")


# ---- what the published data have ------------------------------------------------------------------


def test_image_in_a_text_without_images_is_text(source: Path) -> None:
    data = image_text_data(llava_processor(), given(source, [record("what is <image>?", "a <image>")]))
    sample = data[0]
    processor = llava_processor()
    assert processor.image_token_id not in sample["input_ids"]
    assert data.lengths == [len(sample["input_ids"])]
    said = processor.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED]).replace(" ", "")
    assert said.startswith("a<image>")


def test_what_is_taken_as_llava_takes_it_is_counted(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = record("a", "b")
    first["conversations"].insert(0, {"from": "gpt", "value": "hello"})
    odd = [first, record("<image><image> a", "b", "a.png"), record("a", "b", "a.png")]
    data = image_text_data(llava_processor(), given(source, [GOOD[0], *odd]))
    assert data.text_only == [False, True, False, True]
    said = capsys.readouterr().out
    assert "of 4 samples are taken as LLaVA takes them" in said
    for what in ("first turn by the model", "several <image> in a turn", "image without <image>"):
        assert f"1 {what}" in said


# ---- a source that changes under a run -------------------------------------------------------------


def test_a_run_goes_on_without_records_that_are_gone(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = image_text_data(llava_processor(), given(source, GOOD))
    before.known.save(source.parent)
    kept = Kept.open(source.parent)
    assert kept is not None
    samples = [before[index] for index in range(4)]
    new = record("new?", "yes")
    now = image_text_data(llava_processor(), given(source, [new, GOOD[3], GOOD[0], GOOD[1]])).as_before(kept)
    assert now is not None
    assert "1 of its 4 samples are gone" in (said := capsys.readouterr().out)
    assert "1 new ones are not used" in said
    assert now.digest() == before.digest()
    assert (now.lengths, now.text_only) == (before.lengths, before.text_only)
    for at, stands_in in enumerate((0, 1, 3, 3)):
        assert all(torch.equal(value, now[at][name]) for name, value in samples[stands_in].items())


def test_other_data_are_not_the_same_run(source: Path) -> None:
    kept = image_text_data(llava_processor(), given(source, GOOD)).known
    others = [record(f"what? {number}", "yes") for number in range(4)]
    assert image_text_data(llava_processor(), given(source, others)).as_before(kept) is None


def test_a_place_of_images_is_no_part_of_the_data(source: Path, tmp_path: Path) -> None:
    first = image_text_data(llava_processor(), given(source, GOOD)).digest()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in SIZES:
        (source.parent / name).rename(moved / name)
    assert image_text_data(llava_processor(), given(source, GOOD, image_folder=moved)).digest() == first


# ---- beside the training process -------------------------------------------------------------------


def test_workers_give_the_same_and_their_errors_keep_four_lines(source: Path) -> None:
    late = record("<image>", "yes", cut_jpeg(source.parent))
    data = image_text_data(llava_processor(), given(source, [*GOOD, late]))
    loaded = DataLoader(data, batch_size=None, num_workers=2)
    for index, sample in enumerate(itertools.islice(loaded, 4)):
        assert all(torch.equal(value, data[index][name]) for name, value in sample.items())
    with pytest.raises(DataError, match=r"cut\.jpg is unreadable") as caught:
        list(loaded)
    assert type(caught.value) is DataError
    assert caught.value.where == f"{source}, record 4"
    assert caught.value.do.startswith("start the same command again")


def test_odd_names_can_be_shown(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = source.parent / "problems.jsonl"
    odd = [record("<image>", "yes", name) for name in ("\ud83d.png", "a\0.png", "b" * 5000, "日.png")]
    image_text_data(llava_processor(), given(source, [*GOOD, *odd], on_bad_sample="skip"), file)
    said = capsys.readouterr().out
    assert "\\ud83d.png" in said
    assert "日.png" in said
    said.encode()
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4


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
    monkeypatch.setattr(easy_vqa, "easy_vqa_folder", lambda: source.parent)
    assert len(image_text_data(llava_processor(), ImageTextData("demo-easy-vqa"))) == 4


@pytest.mark.parametrize("package", ["PIL", "torchvision"])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else "there")
    with pytest.raises(ConfigError, match=f"pip install {'pillow' if package == 'PIL' else package}"):
        image_text_data(llava_processor(), ImageTextData("demo-easy-vqa"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"max_length": 0},
        {"text_warmup_steps": -1},
        {"on_bad_sample": "ignore"},
        {"check": "all"},
        {"too_long": "cut"},
        {"max_skipped": 1.5},
    ],
    ids=str,
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ImageTextData("x.json", **wrong)


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
