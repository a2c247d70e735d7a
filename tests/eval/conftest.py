"""Two tiny models, windows and a tokenizer of 97 words: everything the evaluation tests run on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llava_adapters.tiny import VOCABULARY
from tests.tiny_model import tiny_llama, word_tokenizer


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
    return word_tokenizer()
