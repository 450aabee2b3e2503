"""Greedy generation and prefill of one model, timed as it stands: what the demo and `rmsnorm-patch bench` print."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..api import patched
from ..plan import Backend

CPU_NOTE = (
    "on the CPU the patched model runs the original arithmetic in rewritten layers: the ratio shows its overhead, "
    "it is no speed-up"
)

PREFILLS = 5
"""Forwards of the prompt in a round, whose median counts: one takes milliseconds, and a busy machine doubles it."""


@dataclass(frozen=True)
class Rate:
    """Median tokens per second over the rounds, and the slowest and fastest round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rates: list[float]) -> Rate:
        return cls(statistics.median(rates), min(rates), max(rates))


@dataclass(frozen=True)
class Comparison:
    """Stock and patched model, measured in alternating rounds. ratio: medians, patched / stock."""

    work: str
    stock: Rate
    patched: Rate
    rounds: int

    @property
    def ratio(self) -> float:
        return self.patched.median / self.stock.median

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, float]:
    """Greedy continuation [batch, length + new_tokens] of `ids` [batch, length], and new tokens per second."""
    wait(ids.device)
    start = time.perf_counter()
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )
    wait(ids.device)
    return tokens, (tokens.shape[1] - ids.shape[1]) * ids.shape[0] / (time.perf_counter() - start)


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> float:
    """Prompt tokens per second of one forward over `ids` [batch, length]."""
    wait(ids.device)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    wait(ids.device)
    return ids.numel() / (time.perf_counter() - start)


def compare(
    model: Any,
    ids: torch.Tensor,
    new_tokens: int,
    rounds: int,
    backend: Backend = "auto",
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    advance: Callable[[], None] = lambda: None,
) -> tuple[Comparison, Comparison]:
    """(decode, prefill) of `model` as it came and patched, in alternating rounds after one warm-up round of each.

    advance: called after every half round, for a progress bar.
    """
    works = ("decode", "prefill")
    rates: dict[tuple[str, bool], list[float]] = {(work, p): [] for work in works for p in (False, True)}

    def measure(is_patched: bool) -> None:
        rates["decode", is_patched].append(generate(model, ids, new_tokens)[1])
        rates["prefill", is_patched].append(statistics.median(prefill(model, ids) for _ in range(PREFILLS)))
        advance()

    for _ in range(rounds + 1):
        measure(False)
        with patched(model, backend=backend, include=include, exclude=exclude):
            measure(True)
    made = [
        Comparison(work, Rate.of(rates[work, False][1:]), Rate.of(rates[work, True][1:]), rounds)
        for work in works
    ]
    return made[0], made[1]
