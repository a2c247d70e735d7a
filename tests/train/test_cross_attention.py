"""Block-AP of a tower whose blocks look at images by cross-attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from eqat_mm.blocks.source import open_model
from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from eqat_mm.train.modalities import Modalities, equal_weights
from llava_adapters.llava import ARCH as LLAVA
from tests.commands.image_bed import CPU, FIT, SPEC
from tests.train.results import records_of


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
