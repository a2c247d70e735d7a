"""Damaged copies of whole files, as disks, networks and people leave them."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

Damage = Callable[[bytes], bytes]


def _cut(at: float) -> Damage:
    return lambda data: data[: int(at * len(data))]


def _write(at: float, new: bytes) -> Damage:
    def damage(data: bytes) -> bytes:
        start = int(at * len(data))
        return data[:start] + new + data[start + len(new) :]

    return damage


def _insert(at: float, new: bytes) -> Damage:
    return lambda data: data[: int(at * len(data))] + new + data[int(at * len(data)) :]


def _drop(at: float, length: int) -> Damage:
    return lambda data: data[: int(at * len(data))] + data[int(at * len(data)) + length :]


def _swap(first: float, second: float, length: int) -> Damage:
    def damage(data: bytes) -> bytes:
        source = int(first * len(data))
        return _write(second, data[source : source + length])(data)

    return damage


_place = st.floats(0, 1, exclude_max=True) | st.floats(0, 0.1)  # headers are where readers decide
_few = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80"])
_damage = st.one_of(
    st.builds(_cut, _place),
    st.builds(_write, _place, _few),
    st.builds(_write, _place, _few),
    st.builds(_insert, _place, _few),
    st.builds(_drop, _place, st.integers(1, 64)),
    st.builds(_swap, _place, _place, st.integers(1, 64)),
)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """One to four damages of a whole file."""
    data = draw(whole)
    for damage in draw(st.lists(_damage, min_size=1, max_size=4)):
        data = damage(data)
    return data
