"""What a measurement says on a busy machine: the number of threads, and whether a ratio means anything."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from rmsnorm_patch.cli import speed
from rmsnorm_patch.cli.speed import Rate, SpeedComparison
from rmsnorm_patch.cli.tables import speed_table


def comparison(stock: list[float], patched: list[float]) -> SpeedComparison:
    return SpeedComparison("decode", Rate.of(stock), Rate.of(patched), len(stock))


@pytest.mark.parametrize(
    ("stock", "patched", "verdict", "shown"),
    [
        ([100, 101, 102], [150, 160, 170], "faster", "1.584"),
        ([150, 160, 170], [100, 101, 140], "slower", "0.631"),
        ([100, 150, 200], [90, 130, 190], "too noisy", "too noisy"),
        ([100, 300, 300], [90, 10, 101], "too noisy", "too noisy"),
        ([100, 100.5, 101], [99.5, 100, 100.8], "equal", "0.995 (equal)"),
        ([100], [55], "one round", "0.550 (one round)"),
    ],
)
def test_rounds_that_overlap_give_no_ratio(stock: list, patched: list, verdict: str, shown: str) -> None:
    found = comparison(stock, patched)
    assert found.verdict == found.to_dict()["verdict"] == verdict
    text = io.StringIO()
    Console(width=100, file=text).print(speed_table([found]))
    last = text.getvalue().splitlines()[-2]
    assert shown in last
    assert verdict != "too noisy" or f"{found.ratio:.3f}" not in last


def test_what_to_do_about_noise_is_said(command, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy in some rounds: the same work takes one time or five times as long."""
    real, calls = speed.forward, iter(range(10**6))

    def disturbed(*arguments: object) -> float:
        return real(*arguments) * (5 if next(calls) // speed.PREFILLS % 3 else 1)

    monkeypatch.setattr(speed, "forward", disturbed)
    words = ("bench", tiny_llama, "--device", "cpu", "--threads", 1, "--max-new-tokens", 1, "--rounds", 4)
    shown = " ".join(command(*words).stdout.split())
    assert "too noisy │" in shown
    assert "Stop what else runs here, make the rounds longer" in shown


def waiting(seconds: dict[int, float]) -> Callable[[], None]:
    return lambda: time.sleep(seconds[torch.get_num_threads()])


def test_threads_are_those_that_are_faster_here() -> None:
    """One, unless more of them gain a tenth; torch's own number is left alone."""
    before = torch.get_num_threads()
    assert speed.choose_threads(waiting({1: 0.004, 2: 0.02}), (1, 2)) == 1
    assert speed.choose_threads(waiting({1: 0.02, 2: 0.004}), (1, 2)) == 2
    assert speed.choose_threads(waiting({1: 0.02, 2: 0.0195}), (1, 2)) == 1
    assert torch.get_num_threads() == before


def test_bench_chooses_its_threads_unless_it_is_told(command, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(speed, "choose_threads", lambda work, candidates: asked.append(tuple(candidates)) or 1)
    words = ("bench", tiny_llama, "--device", "cpu", "--max-new-tokens", 1, "--rounds", 1, "--json")
    torch.set_num_threads(2)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert command(*words).document["threads"] == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert command(*words, "--threads", 3).document["threads"] == 3
        assert asked == []
        assert command(*words).document["threads"] == 1
        assert (asked, torch.get_num_threads()) == ([(1, 2)], 2)
    finally:
        torch.set_num_threads(1)
