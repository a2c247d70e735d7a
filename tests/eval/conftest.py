"""Two tiny models, windows and a tokenizer of 97 words: everything the evaluation tests run on."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.eval.tiny import VOCABULARY, tiny_llama


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(seed=0)


@pytest.fixture
def other_model() -> LlamaForCausalLM:
    return tiny_llama(seed=1)


@pytest.fixture
def windows_NT() -> Tensor:
    return torch.randint(0, VOCABULARY, (5, 13), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "</s>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
