"""Multiple choice out of a file: both public forms, figures worked out by hand, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_eval.multiple_choice import Item, likelihoods, read_items, summary
from eqat_mm.errors import CheckpointError, DataError
from tests.checkpoint.files import assert_four_lines
from tests.tiny_model import tiny_llama, word_tokenizer

PIQA = {"query": "Question: Where do fish live?\n", "choices": ["in water", "in trees "], "gold": 0}
WINOGRANDE = {"context_options": ["They met because Ann", "They met because Eve"], "continuation": "called.", "gold": 1}


def written(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in records), "utf-8")
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    first, second = read_items(written(tmp_path / "file.jsonl", PIQA, "", WINOGRANDE))
    before = "Question: Where do fish live?\nAnswer:"
    assert first == Item(((before, "in water"), (before, "in trees")), 0)
    assert second == Item((("They met because Ann", "called."), ("They met because Eve", "called.")), 1)


def test_a_query_that_ends_for_an_answer_stays(tmp_path: Path) -> None:
    queries = ["Question: Why?\nAnswer: ", "The sun is", "Passage: One.\nQuestion: is it?\n", "A Question: no"]
    file = written(tmp_path / "file.jsonl", *({"query": each, "choices": ["a", "b"], "gold": 1} for each in queries))
    assert [item.options[0][0] for item in read_items(file)] == [
        "Question: Why?\nAnswer:",
        "The sun is",
        "Passage: One.\nQuestion: is it?\nAnswer:",
        "A Question: no",
    ]
    assert len(read_items(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("not json", "not JSON"),
        ([1], "query"),
        ({"context": "LAMBADA has no", "continuation": "choices"}, "query"),
        (PIQA | {"gold": 2}, "from 0 to 1"),
        (PIQA | {"gold": True}, "from 0 to 1"),
        (PIQA | {"gold": -1}, "from 0 to 1"),
        (PIQA | {"choices": ["one"]}, "two texts or more"),
        (PIQA | {"choices": ["one", " "]}, "not blank"),
        (PIQA | {"choices": "ab"}, "two texts or more"),
        (WINOGRANDE | {"continuation": None}, "continuation"),
        ("", "no question"),
    ],
)
def test_other_records_are_refused_with_their_line(tmp_path: Path, record: Any, message: str) -> None:
    file = written(tmp_path / "file.jsonl", *([PIQA] if record else []), record)
    with pytest.raises(DataError, match=message) as raised:
        read_items(file)
    assert_four_lines(raised.value)
    assert ("line 2" if record else "file.jsonl") in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_items(tmp_path / "none.jsonl")


# ---- figures ----------------------------------------------------------------------------------------


ITEMS = [Item((("q", "ab"), ("q", "abcd")), 0), Item((("q", "ab"), ("q", "abcd"), ("q", "a")), 1)]


def test_figures_are_those_worked_out_by_hand() -> None:
    # sums: the first right by 1, the second wrong by 2; per character: the first wrong (-1.5 < -1), the second right
    found = summary(ITEMS, [[-3.0, -4.0], [-4.0, -6.0, -5.0]])
    assert (found.questions, found.accuracy, found.accuracy_norm) == (2, 0.5, 0.5)
    assert found.margin == pytest.approx((1 - 2) / 2)
    assert found.flips is None
    assert found.margin_change is None


def test_flips_count_both_ways_and_margins_are_compared() -> None:
    own, theirs = [[-3.0, -4.0], [-4.0, -6.0, -5.0]], [[-4.0, -3.5], [-7.0, -6.0, -8.0]]
    found = summary(ITEMS, own, theirs)
    assert found.flips == 1.0  # one became right, one wrong: accuracy is the same
    assert summary(ITEMS, theirs).accuracy == found.accuracy == found.reference_accuracy
    assert found.margin_change == pytest.approx((abs(1 + 0.5) + abs(-2 - 1)) / 2)
    assert summary(ITEMS, own, own).flips == summary(ITEMS, own, own).margin_change == 0.0


def test_a_tie_is_not_right() -> None:
    assert summary(ITEMS[:1], [[-3.0, -3.0]]).accuracy == 0.0


# ---- likelihoods ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama().eval()


def items() -> list[Item]:
    return [
        Item((("w5 w6", "w7 w8 w9"), ("w5 w6", "w10")), 0),
        Item((("w11", "w12"), ("w11 w13 w14", "w12"), ("w3", "w12 w4")), 2),
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_likelihoods_are_those_of_one_forward_each(model: Any, batch_size: int) -> None:
    tokenizer = word_tokenizer()
    found = likelihoods(model, tokenizer, items(), batch_size)
    for item, values in zip(items(), found, strict=True):
        for (begin, ending), value in zip(item.options, values, strict=True):
            ids = torch.tensor([tokenizer(f"{begin} {ending}")["input_ids"]])
            start = len(tokenizer(begin)["input_ids"])
            with torch.no_grad():
                log_probs = model(ids).logits[0].log_softmax(-1)
            expected = sum(float(log_probs[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))
            assert value == pytest.approx(expected, abs=1e-4)


def test_a_broken_model_has_no_likelihood(model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="down_proj"):
        likelihoods(broken, word_tokenizer(), items())
