"""LLM-QAT (arXiv 2305.17888): quantization-aware training of all weights, with activations and KV cache quantized.

The student begins as the full-precision model. The linears of its decoder blocks see rounded weights and inputs,
attention sees rounded keys and values, and all its weights are trained, with straight-through gradients, to predict
what the full-precision model predicts: cross entropy against its softmax over the whole vocabulary. Embedding and head
are trained, too, and stay in full precision. Every step size follows from what is quantized; none is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from eqat_mm.blocks.arch import Arch, set_submodule
from eqat_mm.blocks.attention import quantize_keys_and_values
from eqat_mm.blocks.source import OpenModel
from eqat_mm.checkpoint.manifest import Manifest
from eqat_mm.checkpoint.write import CheckpointWriter
from eqat_mm.data.image_text.columns import alone
from eqat_mm.data.image_text.style import Style
from eqat_mm.quant.bit_widths import BitWidths
from eqat_mm.quant.convert import to_dynamic_fake, to_dynamic_packed
from eqat_mm.quant.dynamic_linear import DynamicFakeLinear
from eqat_mm.quant.smooth import smooth
from eqat_mm.quant.spec import GroupSize, QuantSpec
from eqat_mm.runtime.memory import keep_freed_memory
from eqat_mm.runtime.precision import resolve
from eqat_mm.runtime.settings import Count, CountOrZero, Fraction
from eqat_mm.train.end_to_end import EndToEndConfig, EndToEndTrainer, Sample, run_trainer, train_only
from eqat_mm.train.held_out import HeldOut
from eqat_mm.train.losses import Loss
from eqat_mm.train.order import Order
from eqat_mm.train.recompute import recompute_where_it_pays
from eqat_mm.train.watch import Watch

STAGE = "llm-qat"
ROUNDED = "round-to-nearest"
"""Stage of a checkpoint for which nothing was trained."""


@dataclass(frozen=True)
class LLMQATConfig(EndToEndConfig):
    """LLM-QAT without the model and the data. The defaults are the paper's, for 7B parameters and up.

    Attributes:
        bits: of weights, activations and KV cache, for example 4-8-4; 16 leaves activations or cache as they are.
        group_size: consecutive input channels of a weight that share a step size; -1 for all (paper).
        loss: what is learned: `kl` to the full-precision model's predictions (paper), or `cross-entropy`.
        smooth: strength of SmoothQuant, 0 to 1, before anything is quantized; null leaves it out.
        smooth_samples: samples of the data for the statistics of SmoothQuant.
        max_steps: optimizer steps; overrides `epochs` where it is given. 0 trains nothing: the model is rounded to
            nearest.
    """

    bits: str = "4-8-8"
    group_size: GroupSize = -1
    loss: Loss = "kl"
    smooth: Fraction | None = None
    smooth_samples: Count = 32
    max_steps: CountOrZero | None = None
    batch_size: Count = 1
    accumulation: Count = 8

    def check_together(self) -> None:
        """Check the bits, too."""
        super().check_together()
        BitWidths.parse(self.bits)

    @property
    def trains(self) -> bool:
        """Whether anything is trained; otherwise the model is rounded to nearest."""
        return self.max_steps != 0

    @property
    def reads_data(self) -> bool:
        """Whether data is needed, for training or for statistics."""
        return self.trains or self.smooth is not None

    @property
    def widths(self) -> BitWidths:
        """Bits of weights, activations and KV cache."""
        return BitWidths.parse(self.bits)

    @property
    def spec(self) -> QuantSpec:
        """How weights are stored."""
        return QuantSpec(self.widths.weights, self.group_size, symmetric=True)


def prepare(model: transformers.PreTrainedModel, arch: Arch, config: LLMQATConfig) -> None:
    """Turn a full-precision model into the student, in place: its linears, keys and values are fake-quantized.

    Raises:
        ConfigError: the group size does not divide a layer.
        AdapterError: the adapter's paths do not match the model, or its attention takes no cache.
    """
    widths, spec = config.widths, config.spec
    for index, block in enumerate(arch.find_blocks(model)):
        for path, linear in arch.named_linears(block):
            layer = f"{arch.blocks}.{index}.{path}"
            set_submodule(block, path, to_dynamic_fake(linear, spec, widths.activations, layer=layer))
    quantize_keys_and_values(model, widths.kv_cache)


def smooth_model(
    model: transformers.PreTrainedModel, arch: Arch, samples: Iterable[Sample], config: LLMQATConfig
) -> None:
    """Apply SmoothQuant to a full-precision model in place, where `config` asks for it.

    Args:
        model: in full precision.
        arch: its architecture.
        samples: that its statistics are of: rows of tokens [T], and tensors of images; one at a time.
        config: settings.

    Raises:
        AdapterError: a norm that the smoothing cannot be folded into.
    """
    if config.smooth is not None:
        inputs = ({name: value.to(model.device) for name, value in alone(one).items()} for one in samples)
        batches = ({name: value for name, value in each.items() if name != "labels"} for each in inputs)
        smooth(model, arch.normed_stages(model), batches, config.smooth)


def run_llm_qat(
    model: transformers.PreTrainedModel,
    data: Dataset[Sample],
    config: LLMQATConfig,
    arguments: transformers.TrainingArguments,
    *,
    teacher: nn.Module | None,
    blank: Sample | None = None,
    collator: transformers.DataCollator | None = None,
    order: Order | None = None,
    watch: Watch | None = None,
    held_out: HeldOut | None = None,
) -> list[dict[str, Any]]:
    """Train all weights of the student in place.

    Continues from the last Trainer checkpoint in the output folder of `arguments`, where there is one.

    Args:
        model: from `prepare`, in float32.
        data: samples.
        config: settings; with `max_steps: 0` nothing is done.
        arguments: the same settings as `training_arguments` translates them.
        teacher: full-precision model, for the loss on logits.
        blank: as `EndToEndTrainer` takes it.
        collator: makes a batch of samples; None stacks them.
        order: of the samples, over all processes; None shuffles them.
        watch: who is told of the numbers, beside the console.
        held_out: samples to judge the model by.

    Returns:
        The Trainer's log, one record per line.

    Raises:
        ConfigError: the last checkpoint is of another kind of run.
        TrainingError: the model or the data are not finite, or too many steps were not.
    """
    if not config.trains:
        return []
    keep_freed_memory()
    recompute_where_it_pays(config.gradient_checkpointing, model, arguments)
    trainer = EndToEndTrainer(
        model=model,
        args=arguments,
        groups=trainable_groups(model),
        train_dataset=data,
        data_collator=collator,
        teacher=teacher,
        order=order,
        blank=blank,
        precision=resolve(config.precision, arguments.device),
        stage="LLM-QAT",
        watch=watch,
        held_out=held_out,
        keep_best=config.keep_best,
    )
    return run_trainer(trainer)


def trainable_groups(model: transformers.PreTrainedModel) -> list[dict[str, Any]]:
    """Return the AdamW parameter group of the language model and its head, and make exactly these trainable.

    That is the whole of a language model; of a vision-language model, vision tower and projector stay frozen.
    """
    parameters = [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]
    once = {id(parameter): parameter for parameter in parameters}  # a head can be tied to the embedding
    groups = [{"params": list(once.values()), "weight_decay": 0.0}]
    train_only(model, groups)
    return groups


def store(
    model: transformers.PreTrainedModel,
    opened: OpenModel,
    config: LLMQATConfig,
    folder: Path,
    *,
    source: str,
    provenance: dict[str, Any],
    style: Style | None = None,
) -> Manifest:
    """Quantize the student for real, block by block and in place, and write its checkpoint; it computes the same.

    Args:
        model: from `prepare`, trained or not.
        opened: the full-precision model it was made from.
        config: settings.
        folder: of the checkpoint.
        source: the full-precision model, as it was named.
        provenance: of this stage.
        style: how it is addressed, which its checkpoint keeps; None as it was trained before.
    """
    writer = CheckpointWriter(folder, opened, config.spec, config.widths)
    for index in range(len(opened.blocks)):
        block = model.get_submodule(opened.block_name(index))
        pack(block)
        writer.write_block(index, block)
    trained: Mapping[str, Tensor] = model.state_dict()
    return writer.finish(STAGE if config.trains else ROUNDED, source, provenance, trained, style=style)


@torch.no_grad()
def pack(block: nn.Module) -> None:
    """Replace every fake-quantized linear of a block by the packed one with the same output."""
    for path, module in list(block.named_modules()):
        if isinstance(module, DynamicFakeLinear):
            set_submodule(block, path, to_dynamic_packed(module))
