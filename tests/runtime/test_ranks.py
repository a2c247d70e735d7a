"""What ranks tell each other, and environments in which they cannot."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from eqat_mm.errors import ConfigError
from eqat_mm.runtime.provenance import require_same_everywhere
from eqat_mm.runtime.ranks import ALONE, Ranks, launched_ranks, own_device, world_size
from tests.checkpoint.files import assert_four_lines
from tests.thread_ranks import in_threads

ADDRESS = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *ADDRESS):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, world: str = "2", **more: str) -> None:
    for name, value in (ADDRESS | {"WORLD_SIZE": world} | more).items():
        monkeypatch.setenv(name, value)


# ---- alone ----------------------------------------------------------------------------------------


def test_alone_nothing_is_copied() -> None:
    value = torch.ones(2)
    assert ALONE.sum_(value) is value
    assert ALONE.all_of(held := [1, 2]) is held
    assert list(ALONE.share(3)) == ALONE.held([0, 1, 2]) == [0, 1, 2]
    assert ALONE.from_first(lambda: value) is value
    with launched_ranks(CPU) as ranks:
        assert ranks is ALONE


# ---- together -------------------------------------------------------------------------------------


def test_shares_divide_the_samples() -> None:
    def work(ranks: Ranks) -> tuple[list[int], list[int], list[str]]:
        own = [f"sample {index}" for index in ranks.share(5)]
        return list(ranks.share(5)), ranks.held([4, 1, 0, 3]), ranks.all_of(own)

    shares, held, joined = zip(*in_threads(2, work), strict=True)
    assert shares == ([0, 2, 4], [1, 3])
    assert held == ([2, 0], [0, 1])
    assert joined == ([f"sample {index}" for index in range(5)],) * 2


def test_sums_and_means() -> None:
    def work(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor, float]:
        first, second = torch.full((2, 3), float(ranks.rank)), torch.full((4,), 1.0, dtype=torch.float64)
        ranks.sum_all_([first, second])
        return first, second, ranks.mean(torch.arange(float(1 + ranks.rank)))

    for first, second, mean in in_threads(3, work):
        assert torch.equal(first, torch.full((2, 3), 3.0))
        assert torch.equal(second, torch.full((4,), 3.0, dtype=torch.float64))
        assert mean == pytest.approx((0 + 0 + 1 + 0 + 1 + 2) / 6)


def test_all_take_what_the_first_has() -> None:
    def work(ranks: Ranks) -> tuple[torch.Tensor, str]:
        value = torch.full((2,), 7.0 + ranks.rank)
        ranks.agree_([value])
        return value, ranks.from_first(lambda: f"made by {ranks.rank}")

    for value, made in in_threads(3, work):
        assert torch.equal(value, torch.full((2,), 7.0))
        assert made == "made by 0"


def test_an_error_of_the_first_is_said_once() -> None:
    def work(ranks: Ranks) -> str:
        def fail() -> str:
            raise ConfigError("where", "given", "allowed", "do")

        try:
            return ranks.from_first(fail)
        except ConfigError:
            return "four lines"
        except SystemExit as left:
            return f"status {left.code}"

    assert in_threads(3, work) == ["four lines", "status 2", "status 2"]


# ---- environments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["2", "0", "two"])
def test_a_world_that_no_launcher_made(monkeypatch: pytest.MonkeyPatch, world: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match="torchrun") as raised, launched_ranks(CPU):
        pass
    assert_four_lines(raised.value)
    assert "MASTER_ADDR" in raised.value.given


def test_a_launcher_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, "1")
    assert world_size() == 1
    with launched_ranks(CPU) as ranks:
        assert ranks is ALONE


def test_others_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch)
    monkeypatch.setattr("eqat_mm.runtime.ranks.PATIENCE", timedelta(seconds=1))
    with pytest.raises(ConfigError, match="one launcher") as raised, launched_ranks(CPU):
        pass
    assert_four_lines(raised.value)
    assert "127.0.0.1:1" in raised.value.allowed


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [own_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["auto", "cuda", "cuda:1", "cpu"]
    launched(monkeypatch, LOCAL_RANK="1")
    assert [own_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES") as raised:
        own_device("cuda:0")
    assert_four_lines(raised.value)


def test_processes_that_were_started_differently() -> None:
    same = {"fit": {"epochs": 2}, "seed": 0}
    require_same_everywhere([same, dict(same)])
    with pytest.raises(ConfigError, match="same command") as raised:
        require_same_everywhere([same, dict(same), {"fit": {"epochs": 3}, "seed": 1}])
    assert_four_lines(raised.value)
    assert raised.value.where == "process 2 of 3: fit.epochs, seed"
    assert (raised.value.given, raised.value.allowed) == ("fit.epochs=3", "fit.epochs=2, as in process 0")
