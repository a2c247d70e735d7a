"""What is declared: does it exist, and is it all there is?"""

from __future__ import annotations

import re

from torch import Tensor, nn

from eqat_mm.blocks.arch import EXPERT
from eqat_mm.contract.case import Case, NotHere

SEES = "AutoModelForImageTextToText"


def parts(case: Case) -> None:
    """Declared paths exist, every linear is declared, and the parts are the whole model."""
    opened = case.open()
    case.require(
        len(opened.blocks) >= 2,
        f"a tiny model of {len(opened.blocks)} blocks",
        "two blocks or more",
        "let `tiny` make a model with num_hidden_layers=2",
    )
    declared = case.arch.linears
    case.require(
        len(set(declared)) == len(declared),
        "a path twice in `stages`",
        "every linear once",
        "take it out of one of the stages",
    )
    case.arch.full_precision_parts(opened.model)


def kinds(case: Case) -> None:
    """What is declared of blocks is in some block of the tiny model, and no matrix of theirs is left out."""
    blocks = case.open().blocks
    names = {_alike(name) for block in blocks for name, _ in block.named_modules()}
    absent = [path for path in (*case.arch.linears, *case.arch.kept) if path not in names]
    case.require(
        not absent,
        f"{', '.join(absent[:3])} in no block of the tiny model",
        "each declared path in one block or more",
        "correct the path, or let `tiny` make blocks of all kinds",
    )
    for block in blocks:
        known = {*case.arch.linears_of(block), *case.arch.kept}
        left = [name for name, module in block.named_modules() if name not in known and _is_matrix(module)]
        case.require(
            not left,
            f"{', '.join(left[:3])}: a matrix that is neither quantized nor kept",
            "routers and the like in `kept`",
            "list it there: to other readers it may be a linear, which they must leave alone",
        )


def _alike(name: str) -> str:
    """Return a path with `*` for the number of an expert."""
    return re.sub(r"\.\d+(?=\.)", f".{EXPERT}", name)


def _is_matrix(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2


def projector(case: Case) -> None:
    """A vision-language model has a projector in full precision, a language model has none."""
    sees, found = case.arch.auto_class == SEES, case.arch.find_projector(case.open().model)
    case.require(
        (found is not None) is sees,
        f"projector {case.arch.projector!r} with {case.arch.auto_class}",
        "one in vision-language models, None in language models",
        "set `projector`",
    )
    case.require(
        not sees or any(f"{case.arch.projector}.".startswith(f"{part}.") for part in case.arch.full_precision),
        f"projector {case.arch.projector!r}, which is not in `full_precision`",
        "the projector among the parts in full precision, or inside one",
        "list it there, too",
    )


def padding(case: Case) -> None:
    """The batches of `tiny` have padding on both sides, and one has none."""
    masks = [batch.get("attention_mask") for batch in case.batches]
    padded = [mask for mask in masks if mask is not None and not mask.bool().all()]
    both = any(_some_padded(mask[:, 0]) for mask in padded) and any(_some_padded(mask[:, -1]) for mask in padded)
    case.require(
        both and len(padded) < len(masks),
        f"{len(padded)} of {len(masks)} batches padded{'' if both else ', not on both sides'}",
        "one batch or more padded on the left, on the right, and not at all",
        "return the batches of `text_batches` from `tiny`",
    )


def images(case: Case) -> None:
    """Samples of a vision-language model differ in their images, and some batches have none."""
    if case.arch.auto_class != SEES:
        raise NotHere("a language model")
    seen = [batch["input_ids"] for batch in case.batches if "pixel_values" in batch]
    token = image_token(case)
    counts = [(tokens == token).sum(1).tolist() for tokens in seen]
    case.require(
        0 < len(seen) < len(case.batches) and all(0 in each and len(set(each)) > 1 for each in counts),
        f"image tokens by sample: {counts}, in {len(seen)} of {len(case.batches)} batches",
        "samples with different numbers of them, none among these, and batches of text alone",
        "let `tiny` return such batches",
    )


def image_token(case: Case) -> int:
    """Return the token that stands for (a part of) an image."""
    config = case.open().model.config
    names = ("image_token_id", "image_token_index")
    return next(value for name in names if isinstance(value := getattr(config, name, None), int))


def _some_padded(column: Tensor) -> bool:
    return bool((column == 0).any())
