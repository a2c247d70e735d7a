"""A tokenizer small enough to know every token id by heart."""

from __future__ import annotations

import pytest
from PIL import ImageFile
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

WORDS = ("<unk>", "<eos>", *(f"w{index}" for index in range(100)))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `w0` is 2, `w1` is 3, ...; `<eos>` is 1."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(autouse=True)
def _refuse_truncated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own setting: importing lmms-eval, as other tests do, changes it for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
