"""The demo LLaVA as a Hugging Face folder: the language model of the asset plus the trained parts in this package."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from eqat_demo.assets import asset_cache, building, is_finished
from eqat_demo.smollm2 import smollm2_folder
from eqat_mm.runtime.files import sha256_of
from eqat_mm.runtime.progress import say

NAME = "demo-llava"
PARTS = Path(__file__).parent / "parts"
VISION_TOWER, PROJECTOR, LORA, CARD = "vision_tower", "projector.safetensors", "lora.safetensors", "README.md"
IMAGE_TOKEN = "<image>"
PROMPT = "USER: <image>\n{question} ASSISTANT:"
_UNUSED_TOKEN = "<jupyter_code>"  # of the language model's vocabulary; it becomes IMAGE_TOKEN
_ASSEMBLY = 1  # raise it whenever the assembled folder changes: old ones are then made anew
_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set text = message.content %}
    {%- else %}
        {%- set text = message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join %}
        {%- set images = message.content | selectattr("type", "equalto", "image") | list %}
        {%- set text = "<image>\\n" * (images | length) ~ text %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {{- "ASSISTANT: " ~ text ~ eos_token }}
    {%- else %}
        {{- message.role | upper ~ ": " ~ text ~ " " }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "ASSISTANT:" }}
{%- endif %}"""


def demo_llava_folder(cache: Path | None = None) -> Path:
    """A small LLaVA around SmolLM2-135M, trained on easy-VQA (Apache-2.0), assembled on the first call.

    Args:
        cache: folder of all assets, instead of `asset_cache()`.

    Raises:
        DataError: the language model cannot be fetched.
    """
    return folder_of_parts(PARTS, NAME, cache)


def folder_of_parts(parts: Path, name: str, cache: Path | None) -> Path:
    """Return the folder `name` in the cache, made of shipped `parts` on the first call; see `demo_llava_folder`."""
    origin = f"{_hash_of(parts)} assembly:{_ASSEMBLY}"
    folder = (cache or asset_cache()) / name
    if is_finished(folder, origin):
        return folder
    language = smollm2_folder(cache)
    say(f"assembling {name} (once)")
    with building(folder, origin) as unfinished:
        assemble(parts, language, unfinished)
        shutil.copy(parts / CARD, unfinished / CARD)
        shutil.copy(language / "LICENSE", unfinished / "LICENSE")
    return folder


def assemble(parts: Path, language_folder: Path, folder: Path) -> None:
    """Write the LLaVA that consists of the trained `parts` and a language model to `folder`, in float32."""
    tower = CLIPVisionModel.from_pretrained(parts / VISION_TOWER, dtype=torch.float32)
    language: Any = AutoModelForCausalLM.from_pretrained(language_folder, dtype=torch.float32)
    add_updates(language, load_file(parts / LORA))
    processor = llava_processor(language_folder, tower.config)
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(llava_config(tower.config, language.config, processor))
    model.model.vision_tower = tower
    model.model.multi_modal_projector = load_projector(parts, model.config)
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.generation_config = language.generation_config
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def add_updates(language: nn.Module, factors: dict[str, Tensor]) -> None:
    """Add B A to the weight of every linear that has factors: `<path>.lora_A` and `<path>.lora_B`."""
    with torch.no_grad():
        for name in factors:
            path, _, factor = name.rpartition(".")
            if factor == "lora_A":
                update = factors[f"{path}.lora_B"].float() @ factors[name].float()
                language.get_parameter(f"{path}.weight").add_(update)


def llava_processor(language_folder: Path, vision: Any) -> LlavaProcessor:
    """Return the processor: the language model's tokenizer with an image token, and CLIP's image processor."""
    size = vision.image_size
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer_with_image_token(language_folder),
        patch_size=vision.patch_size,
        num_additional_image_tokens=1,  # the class token, which the strategy "default" drops again
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        chat_template=_TEMPLATE,
    )


def tokenizer_with_image_token(language_folder: Path) -> Any:
    """Return the tokenizer with an unused token renamed to `IMAGE_TOKEN`, so that the vocabulary keeps its size."""
    tokenizer: Any = AutoTokenizer.from_pretrained(language_folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary[IMAGE_TOKEN] = vocabulary.pop(_UNUSED_TOKEN)
    for token in backend["added_tokens"]:
        if token["content"] == _UNUSED_TOKEN:
            token["content"] = IMAGE_TOKEN
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def llava_config(vision: Any, language: Any, processor: LlavaProcessor) -> LlavaConfig:
    """Return the configuration of the whole model.

    It has copies of the parts' configurations: transformers clears the attention implementation of those it is given,
    and a model whose own is cleared adds boolean masks to its scores instead of masking.
    """
    return LlavaConfig(
        vision_config=copy.deepcopy(vision),
        text_config=copy.deepcopy(language),
        image_token_index=processor.image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=language.tie_word_embeddings,
    )


def load_projector(parts: Path, config: LlavaConfig) -> LlavaMultiModalProjector:
    """Return the trained projector in float32."""
    projector = LlavaMultiModalProjector(config)
    projector.load_state_dict(load_file(parts / PROJECTOR))
    return projector


def _hash_of(parts: Path) -> str:
    files = sorted(path for path in parts.rglob("*") if path.is_file())
    digests = "".join(sha256_of(path) for path in files)
    return f"sha256:{hashlib.sha256(digests.encode()).hexdigest()}"
