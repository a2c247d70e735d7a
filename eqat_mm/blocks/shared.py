"""What several blocks are given at once: tensors, dictionaries, lists and other objects, which they may read.

A block that changes such an object speaks to the blocks behind it beside the hidden states. Replayed, it would be heard
at the wrong time, by the wrong stream, or not at all; so it is refused by name, as soon as it is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from eqat_mm.errors import AdapterError


class Seen(NamedTuple):
    """An object, and what it held.

    Attributes:
        value: the object.
        held: its members, or the version of a tensor.
    """

    value: Any
    held: Any

    @property
    def changed(self) -> bool:
        """Whether it holds something else by now."""
        now = _held(self.value)
        if not isinstance(now, dict):
            return bool(now != self.held)
        return now.keys() != self.held.keys() or any(now[name] is not self.held[name] for name in now)


def named_arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call behind the hidden states, by what messages call them."""
    return {f"argument {place}": value for place, value in enumerate(args, 2)} | dict(kwargs)


def shared_arguments(calls: Sequence[Mapping[str, Any]]) -> list[frozenset[str]]:
    """Return, for each call of one forward, the arguments that hold something which another call is given, too."""
    inside = [{name: {id(one) for one in _changeable(value, set())} for name, value in call.items()} for call in calls]
    counts = Counter(one for call in inside for one in set().union(*call.values()))
    return [frozenset(name for name, ids in call.items() if any(counts[one] > 1 for one in ids)) for call in inside]


def look_at(arguments: Mapping[str, Any]) -> dict[str, list[Seen]]:
    """Return, by argument, the objects in it that can be changed, with what they hold."""
    return {name: [Seen(one, _held(one)) for one in _changeable(value, set())] for name, value in arguments.items()}


def changed_objects(looked_at: Mapping[str, list[Seen]]) -> list[tuple[str, Any]]:
    """Return what was changed since, each object with the argument that holds it."""
    return [(name, seen.value) for name, each in looked_at.items() for seen in each if seen.changed]


def changes_shared(block: nn.Module, where: str, argument: str, value: Any) -> AdapterError:
    """Return the error of a block that changes what other blocks are given, too.

    Args:
        block: the block.
        where: its place.
        argument: that holds the object.
        value: the object.
    """
    return AdapterError(
        where=f"{where} ({type(block).__name__}): {argument}",
        given=f"a {type(value).__name__} that the block changes, and that other blocks are given, too",
        allowed="blocks that pass on nothing but hidden states",
        do="such a model cannot be quantized block by block here; choose one whose blocks share no state",
    )


def _held(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value._version
    if isinstance(value, dict):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, list) else dict(vars(value))


def _changeable(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield an object and those in it that can be changed, each once; modules and code count as constant."""
    if id(value) in seen or isinstance(value, nn.Module | type) or callable(value):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict | list) or hasattr(value, "__dict__"):
        yield value
    members = _held(value).values() if isinstance(value, dict | list) or hasattr(value, "__dict__") else ()
    for member in value if isinstance(value, tuple) else members:
        yield from _changeable(member, seen)
