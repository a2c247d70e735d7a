"""What the walker computes, against the model's own forward; what `stages`, `sums` and `norms` say, against both."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch, Stage
from eqat_mm.blocks.capture import CapturedSample
from eqat_mm.blocks.walker import BlockWalker, capture_front
from eqat_mm.contract.case import ANOTHER_ROUTE, CPU, Call, Case, NotHere, calls_of, difference
from eqat_mm.quant.smooth import smooth

_CHAINED = "hidden states of the model's own forward, bit for bit"
_CHAIN = "look at what the model does between its blocks; such a model needs more than an adapter"


def chained(case: Case) -> None:
    """Blocks called one after the other give what the model's own forward gives, bit for bit."""
    model = case.model()
    for inputs in case.batches:
        expected = case.outputs_of_blocks(model, inputs)
        for _, step in case.walk([inputs], batch_tokens=1):
            same = torch.equal(step.fp.read(0), expected[step.index])
            case.require(same, f"other hidden states behind block {step.index}", _CHAINED, _CHAIN)


def chained_in_16_bits(case: Case) -> None:
    """So they do where files are in bfloat16 and the width has no round root: factors are those of float32."""
    folder, inputs = case.in_16_bits(), case.batches[0]
    expected = case.outputs_of_blocks(case.model(folder), inputs)
    for _, step in case.walk([inputs], folder=folder):
        same = torch.equal(step.fp.read(0), expected[step.index])
        case.require(same, f"other hidden states behind block {step.index}", _CHAINED, _CHAIN)


def together(case: Case) -> None:
    """Samples called together give what they give alone."""
    model = case.model()
    expected = [case.outputs_of_blocks(model, inputs) for inputs in case.batches]
    for _, step in case.walk(case.batches):
        for index, alone in enumerate(expected):
            error = difference(step.fp.read(index), alone[step.index])
            case.require(
                error < ANOTHER_ROUTE,
                f"sample {index} differs by {error:.1e} behind block {step.index} when others are called with it",
                "each sample as it is alone",
                "look for an argument of the blocks that carries the batch in a dimension other than the first",
            )


def one_block_in_memory(case: Case) -> None:
    """Weights of one block are in memory at a time, and none while calls are recorded."""
    opened = case.open()

    def samples() -> Iterator[CapturedSample]:
        for sample in capture_front(opened, case.batches, torch.float32):
            inside = [name for name in _in_memory(opened.model) if name.startswith(f"{case.arch.blocks}.")]
            case.require(not inside, f"{inside[:2]} in memory during the capture", "no block", _CHAIN)
            yield sample

    walker = BlockWalker(opened, samples(), device=CPU)
    for step in walker.walk():
        own = [f"{step.name}.{name}" for name, _ in step.block.named_parameters()]
        found = _in_memory(opened.model)
        case.require(found == own, f"{len(found)} tensors in memory, {found[:2]} ...", f"the {len(own)} of it", _CHAIN)
    case.require(_in_memory(opened.model) == [], "weights in memory behind the last block", "none", _CHAIN)


def stages(case: Case) -> None:
    """Linears run in the order of `stages`, and those of a stage read the same input."""
    model = case.model()
    for index, block in enumerate(case.arch.find_blocks(model)):
        calls = _calls_in(case, model, block, case.arch.linears_of(block))
        done: dict[str, int] = {}  # of all tokens, "", and of each expert: the last call of a stage so far
        for each in case.arch.rounds_of(block):
            for stage in each.stages:
                scope = "" if each.experts is None else stage[0].rpartition(".")[0]
                _require_stage(case, f"block {index}: {', '.join(stage)}", stage, calls, done, scope)


def _require_stage(case: Case, where: str, stage: Stage, calls: list[Call], done: dict[str, int], scope: str) -> None:
    own = {place: call for place, call in enumerate(calls) if call.name in stage}
    if scope and not own:  # an expert that no token is sent to
        return
    before = [place for name, place in done.items() if not scope or name in ("", scope)]
    case.require(
        bool(own) and min(own) > max(before, default=-1),
        f"{where}: {'runs before, or together with, a stage before it' if own else 'never called'}",
        "stages in the order in which data passes them",
        "put the stages in order; linears that read one input at different times are stages of their own",
    )
    done[scope] = max(own)
    first, *others = own.values()
    case.require(
        all(torch.equal(call.input, first.input) for call in others),
        f"{where}: different inputs",
        "one input for all linears of a stage",
        "make a stage of its own of each",
    )


def sums(case: Case) -> None:
    """What `sums` declares moves with its linear."""
    if not case.arch.sums:
        raise NotHere("no `sums`")
    model = case.model()
    for block in case.arch.find_blocks(model):
        own = case.arch.linears_of(block)
        for linear, module in (pair for pair in case.arch.sums if pair[0] in own):
            still, moved = _moved(case, model, block, linear, module)
            error = difference(moved, still + 0.25)
            case.require(
                error < ANOTHER_ROUTE,
                f"({linear!r}, {module!r}): off by {error:.1e} when the linear's output is shifted",
                "the linear's output, unscaled, is a summand of what the module reads",
                "correct the pair, or leave it out: the stream correction then looks at the linear alone",
            )


def smoothing(case: Case) -> None:
    """SmoothQuant over `norms` leaves the logits as they are."""
    if not case.arch.norms:
        raise NotHere("no `norms`")
    model, inputs = case.model(), case.batches[0]
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        smooth(model, case.arch.normed_stages(model), [inputs], 0.5)
        error = difference(model(**inputs, use_cache=False).logits, expected)
    case.require(
        error < ANOTHER_ROUTE,
        f"logits that differ by {error:.1e}",
        "the same logits",
        "take out of `norms` every norm whose output something beside the linears of its stage reads",
    )


def experts(case: Case) -> None:
    """Experts that are split compute what transformers' merged ones do."""
    if not any(each.experts for block in case.open().blocks for each in case.arch.rounds_of(block)):
        raise NotHere("no experts")
    split, merged = case.model(), case.model(split=False)
    for inputs in case.batches:
        with torch.no_grad():
            error = difference(split(**inputs, use_cache=False).logits, merged(**inputs, use_cache=False).logits)
        case.require(
            error < ANOTHER_ROUTE,
            f"logits that differ by {error:.1e}",
            "those of the model as transformers has it",
            "leave the experts out of `stages`: their forward is not down(act(gate) * up)",
        )


def _calls_in(case: Case, model: nn.Module, block: nn.Module, paths: tuple[str, ...]) -> list[Call]:
    return calls_of({path: case.arch.find(block, path) for path in paths}, model, case.batches[0])


def _moved(case: Case, model: nn.Module, block: nn.Module, linear: str, module: str) -> tuple[Tensor, Tensor]:
    """Return the sum of a pair as it is, and with the linear's output shifted by 0.25."""
    arch: Arch = case.arch

    def sum_now() -> Tensor:
        (call,) = calls_of({module: arch.find(block, module)}, model, case.batches[0])
        return call.output if module == "" else call.input

    still = sum_now()
    with arch.find(block, linear).register_forward_hook(lambda _, __, output: output + 0.25):
        return still, sum_now()


def _in_memory(model: nn.Module) -> list[str]:
    """Names of the parameters that hold numbers of their own: no stand-ins, which are one number, expanded."""
    real = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta)
    return [name for name, parameter in real if parameter.untyped_storage().nbytes() >= parameter.nbytes]
