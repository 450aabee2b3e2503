"""Generation and forwards of one model, timed as it stands: what the demo and `rmsnorm-patch bench` print."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..api import patched
from ..backends.names import Backend
from .inputs import parameters_of

CPU_NOTE = (
    "on the CPU the patched model runs the original arithmetic in rewritten layers: the ratio shows its overhead, "
    "it is no speed-up"
)

NOISE_NOTE = (
    "too noisy: rounds of stock and patched overlap. Stop what else runs here, make the rounds longer with "
    "--max-new-tokens or --batch-size, or set --threads"
)

PREFILLS = 5
"""Forwards of the prompt in a round, whose median counts: one is short, and a busy machine doubles it."""

EQUAL = 0.02
"""Rounds that overlap say "equal" where they all lie this close together, else they say nothing."""

THREAD_GAIN = 1.1
"""More threads must be this much faster than one: beside other work they only look so for a moment."""

ModelInputs = dict[str, torch.Tensor]


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
class Patch:
    """The options of `apply`."""

    backend: Backend = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpeedComparison:
    """Stock and patched model, measured in alternating rounds. ratio: medians, patched / stock."""

    work: str
    stock: Rate
    patched: Rate
    rounds: int

    @property
    def ratio(self) -> float:
        return self.patched.median / self.stock.median

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest ratio of any two rounds."""
        return self.patched.low / self.stock.high, self.patched.high / self.stock.low

    @property
    def verdict(self) -> str:
        """What the rounds show: "faster", "slower", "equal", "too noisy", or "one round", which shows no noise."""
        low, high = self.bounds
        if self.rounds == 1:
            return "one round"
        if low > 1 or high < 1:
            return "faster" if low > 1 else "slower"
        return "equal" if max(1 - low, high - 1) <= EQUAL else "too noisy"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "ratio_bounds": list(self.bounds), "verdict": self.verdict}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(inputs: ModelInputs, batch: int) -> ModelInputs:
    """`inputs` of one sequence, `batch` times."""
    return {name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in inputs.items()}


@torch.inference_mode()
def generate(model: Any, inputs: ModelInputs, new_tokens: int) -> tuple[torch.Tensor, float]:
    """Greedy continuation [batch, length + new_tokens] of a prompt [batch, length] (of an encoder-decoder: what its
    decoder wrote), and new tokens per second."""
    ids = inputs["input_ids"]
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    given.setdefault("attention_mask", torch.ones_like(ids))
    wait(ids.device)
    start = time.perf_counter()
    tokens = model.generate(
        **given,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )
    wait(ids.device)
    return tokens, new_tokens * ids.shape[0] / (time.perf_counter() - start)


@torch.inference_mode()
def forward(model: Any, inputs: ModelInputs) -> float:
    """Tokens (of a model that reads none: samples) per second of one forward; a generating one's prefill."""
    first = next(iter(inputs.values()))
    ids = inputs.get("input_ids")
    names = parameters_of(model.forward)
    options = {name: value for name, value in (("use_cache", True), ("logits_to_keep", 1)) if name in names}
    wait(first.device)
    start = time.perf_counter()
    model(**inputs, **options)
    wait(first.device)
    return (first.shape[0] if ids is None else ids.numel()) / (time.perf_counter() - start)


def choose_threads(work: Callable[[], object], candidates: Sequence[int]) -> int:
    """How many threads are best for `work` on this machine as busy as it is: the first candidate, or one that is faster
    by THREAD_GAIN. The number of threads is left as it was."""
    before = torch.get_num_threads()
    seconds: dict[int, float] = {}
    try:
        for threads in candidates:
            torch.set_num_threads(threads)
            taken = []
            for _ in range(4):
                start = time.perf_counter()
                work()
                taken.append(time.perf_counter() - start)
            seconds[threads] = statistics.median(taken[1:])
    finally:
        torch.set_num_threads(before)
    best = min(seconds, key=lambda threads: seconds[threads])
    return best if seconds[best] * THREAD_GAIN < seconds[candidates[0]] else candidates[0]


@contextmanager
def chosen_threads(model: Any, inputs: ModelInputs, generates: bool, wanted: int | None = None) -> Iterator[int]:
    """The number of threads within the block: `wanted`, else OMP_NUM_THREADS as torch took it, else what is fastest."""
    before = torch.get_num_threads()

    def work() -> None:
        forward(model, inputs)
        if generates:
            generate(model, inputs, 2)

    on_cpu = next(iter(inputs.values())).device.type == "cpu"
    if wanted is None and on_cpu and "OMP_NUM_THREADS" not in os.environ and before > 1:
        wanted = choose_threads(work, sorted({1, before // 2, before}))
    torch.set_num_threads(wanted or before)
    try:
        yield wanted or before
    finally:
        torch.set_num_threads(before)


def compare(
    model: Any,
    inputs: ModelInputs,
    generates: bool,
    new_tokens: int,
    rounds: int,
    patch: Patch,
    advance: Callable[[], None] = lambda: None,
) -> tuple[SpeedComparison, ...]:
    """(decode, prefill) of `model` as it came and patched, in alternating rounds after one warm-up round of each;
    (forward,) of a model that does not generate.

    advance: called after every half round, for a progress bar.
    """
    works: dict[str, Callable[[], float]] = {}
    if generates:
        works["decode"] = lambda: generate(model, inputs, new_tokens)[1]
    name = "prefill" if generates else "forward"
    works[name] = lambda: statistics.median(forward(model, inputs) for _ in range(PREFILLS))
    rates: dict[tuple[str, bool], list[float]] = {(work, p): [] for work in works for p in (False, True)}

    def measure(is_patched: bool) -> None:
        for work, measured in works.items():
            rates[work, is_patched].append(measured())
        advance()

    for _ in range(rounds + 1):
        measure(False)
        with patched(model, **asdict(patch)):
            measure(True)
    return tuple(
        SpeedComparison(work, Rate.of(rates[work, False][1:]), Rate.of(rates[work, True][1:]), rounds) for work in works
    )
