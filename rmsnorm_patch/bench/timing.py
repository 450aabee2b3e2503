"""Device and host timing: CUDA graphs of many launches, medians with their spread.

Modes (all in microseconds per launch):
    cold    rotating operand sets that together exceed the L2 cache several times; outputs are distinct as well
    hot     one operand set and one set of results, used again and again (in place, they are the same memory)
    chain   each launch reads what the one before wrote, as decode does
    host    wall time of an eager call, the queue never waiting for the device
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COLD_BYTES = 640 * 2**20
"""Operand sets of a cold run add up to this: ten times an H200's L2 (60 MB), so that no line survives a round."""


@dataclass(frozen=True)
class Timing:
    """Median microseconds per launch, with the 10th and 90th percentile of the replays."""

    us: float
    low: float
    high: float


def _summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    at = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]  # noqa: E731
    return Timing(statistics.median(ordered), at(0.1), at(0.9))


def replay(launches: Callable[[], list], count: int, replays: int) -> Timing:
    """Capture `launches()` (which enqueues `count` launches and returns what must stay alive) and time its replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        keep = launches()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        keep = launches()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    samples = [start.elapsed_time(end) * 1e3 / count for start, end in marks]
    del keep
    graph.reset()
    return _summary(samples)


def host(call: Callable[[], object], calls: int = 2000, rounds: int = 7) -> Timing:
    """Wall time per eager call. The work must be small enough for the device to keep up."""
    for _ in range(200):
        call()
    torch.cuda.synchronize()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) * 1e6 / calls)
        torch.cuda.synchronize()
    return _summary(samples)
