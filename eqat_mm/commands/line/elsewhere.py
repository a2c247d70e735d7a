"""What other training scripts call an option: LLaVA's and transformers' own names.

Where such a name means the same as an option of a command, it is taken for it. Another name is answered with what
to do.
"""

from __future__ import annotations

from dataclasses import dataclass

_TRUE = {"": "true", "true": "true", "false": "false"}


@dataclass(frozen=True)
class Alias:
    """An option under the name that it has elsewhere.

    Attributes:
        options: what it is called here; the first that a command has counts.
        values: what each value is called here, where it differs; the value of a flag without one is "".
    """

    options: tuple[str, ...]
    values: dict[str, str] | None = None


ALIASES: dict[str, Alias] = {
    "bf16": Alias(("precision",), {"": "bfloat16", "true": "bfloat16", "false": "float32"}),
    "bits": Alias(("quant.bits",)),
    "data_path": Alias(("conversations.source", "conversations")),
    "dataset_path": Alias(("conversations.source", "conversations")),
    "eval_data_path": Alias(("conversations.held_out_source", "data.source")),
    "eval_steps": Alias(("held_out_steps",)),
    "gradient_accumulation_steps": Alias(("accumulation",)),
    "fresh": Alias(("overwrite",), _TRUE),
    "group_size": Alias(("quant.group_size",)),
    "image_aspect_ratio": Alias(("conversations.images",), {"pad": "pad", "square": "crop"}),
    "image_folder": Alias(("conversations.image_folder", "images")),
    "lora_alpha": Alias(("lora.alpha",)),
    "lora_enable": Alias(("trains",), {"": "lora", "true": "lora", "false": "scales"}),
    "lora_r": Alias(("lora.rank",)),
    "lr": Alias(("learning_rate",)),
    "max_grad_norm": Alias(("clip_norm",)),
    "max_seq_length": Alias(("conversations.max_length",)),
    "mm_projector_lr": Alias(("lr_projector",)),
    "model_max_length": Alias(("conversations.max_length",)),
    "model_name_or_path": Alias(("model",)),
    "model_path": Alias(("model",)),
    "num_train_epochs": Alias(("epochs",)),
    "output_dir": Alias(("output",)),
    "overwrite_output_dir": Alias(("overwrite",), _TRUE),
    "per_device_eval_batch_size": Alias(("batch_size",)),
    "per_device_train_batch_size": Alias(("batch_size",)),
    "train_projector": Alias(("trains",), {"": "scales+projector", "true": "scales+projector", "false": "scales"}),
    "tune_mm_mlp_adapter": Alias(("trains",), {"": "projector", "true": "projector", "false": "scales"}),
    "version": Alias(("conversations.template",), {"v1": "vicuna_v1", "vicuna_v1": "vicuna_v1"}),
    "wbits": Alias(("quant.bits",)),
}
"""Their name -> ours, in commands that have no option of that name themselves."""

SAME_ANYWAY = {"resume": "true", "resume_from_checkpoint": "true", "do_train": "true", "lazy_preprocess": "true"}
"""Flags that ask for what is done anyway, with the value that does."""

ANSWERS: dict[str, str] = {
    "evaluation_strategy": "leave it out: --held_out_steps says when",
    "fp16": "leave it out: products are bfloat16 or float32, see --precision",
    "freeze_backbone": "leave it out: see --trains",
    "load_in_4bit": "leave it out: the checkpoint says how it is stored",
    "lr_scheduler_type": "leave it out: the rate falls along a cosine to --lr_floor of its peak",
    "mm_projector_type": "leave it out: the model says it",
    "mm_vision_select_layer": "leave it out: the model says it",
    "optim": "leave it out: it is AdamW",
    "resume": "a stopped run goes on with the same command; --overwrite begins anew",
    "resume_from_checkpoint": "a stopped run goes on with the same command; --overwrite begins anew",
    "save_strategy": "leave it out: --save_steps says when",
    "save_total_limit": "leave it out: the last two are kept",
    "tf32": "leave it out: see --precision",
    "vision_tower": "leave it out: it is part of the model",
    "warmup_ratio": "give the number of steps: --warmup_steps",
    "weight_decay": "leave it out: step sizes have none",
}
"""Other names, with what to do."""
