"""The second judgement, the data flow: the original model in lockstep with the patched run.

The patched run is recorded at every norm: a digest of the norm's input, and its output. Then the original model runs
with its norms made to return those outputs. All other code is the same code on the same bits, so every norm must meet
the recorded input and the run must end in the recorded result, bit for bit. What the judgement of sites says of
each norm and what this says of everything between them is, together, the whole model.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn as nn

from ..numerics.tolerances import SITE
from ..rewrite import observe
from .difference import bit_mismatches, bits, digest


def is_call(event: observe.Event) -> bool:
    """Whether `event` stands for one call of its norm in the original model. "cross_layer" computes for a later call; a
    pair that fell back reports only why ("kept", too), and the norm that it called has an event of its own."""
    if event.kind in ("in_layer", "norm_add"):
        return event.backend != "original"
    return event.kind not in ("cross_layer", "kept", "single", "unrotated")


@dataclass
class TapedCall:
    """One norm call: the norm's path, a digest of its input, its result."""

    path: str
    digest: int
    normed: torch.Tensor


@dataclass
class Tape:
    """The norm calls of one run, in order. space: bytes of normed tensors it may hold. wanted: bytes that came."""

    space: int
    calls: list[TapedCall] = field(default_factory=list)
    outputs: tuple[torch.Tensor, ...] = ()
    wanted: int = 0

    def add(self, path: str, event: observe.Event) -> bool:
        """False, and nothing is kept from then on, where the recording does not fit."""
        self.wanted += event.normed.numel() * event.normed.element_size()
        if self.wanted > self.space:
            self.calls.clear()
            return False
        entered = event.total if event.kind == "in_layer" and event.total is not None else event.operands[0]
        self.calls.append(TapedCall(path, digest(entered), event.normed.detach().to("cpu", copy=True)))
        return True

    def observe(self, path_of: Callable[[nn.Module], str], event: observe.Event) -> None:
        if is_call(event):
            self.add(path_of(event.norm), event)


@dataclass
class Replay:
    """What the original model did against a tape. first_difference: "" where all of it was bit-equal."""

    calls: int = 0
    first_difference: str = ""
    site: str = ""

    def differ(self, site: str, text: str) -> None:
        self.site, self.first_difference = site, text


def replay(
    model: nn.Module, run: Callable[[nn.Module], tuple[torch.Tensor, ...]], tape: Tape, paths: Mapping[str, nn.Module]
) -> Replay:
    """Run the original `model`, its norms at `paths` returning what `tape` holds."""
    done = Replay()

    def feed(path: str, entered: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        if done.first_difference:
            return None
        call = tape.calls[done.calls] if done.calls < len(tape.calls) else None
        if call is None:
            done.differ(path, f"{path}: called by the original, not by the patched model")
        elif call.path != path:
            done.differ(path, f"norm call {done.calls}: {call.path} in place of {path}")
        elif call.digest != digest(entered):
            done.differ(path, f"{path}: its input is not the original's (norm call {done.calls})")
        if call is None or done.first_difference:
            return None
        done.calls += 1
        return call.normed.to(output.device)

    with hooked(paths, feed):
        outputs = run(model)
    if not done.first_difference and done.calls < len(tape.calls):
        path = tape.calls[done.calls].path
        done.differ(path, f"{path}: called by the patched model, not by the original")
    if not done.first_difference:
        for number, (left, right) in enumerate(zip(tape.outputs, outputs, strict=True)):
            if mismatches := bit_mismatches(left, right):
                last = tape.calls[-1].path if tape.calls else ""
                done.differ(last, f"output {number} after {last}: {mismatches} of {right.numel()} elements differ")
                break
    return done


def reproducible(model: nn.Module, run: Callable[[nn.Module], tuple[torch.Tensor, ...]]) -> bool:
    """Whether the model gives the same bits twice."""
    return all(not bit_mismatches(a, b) for a, b in zip(run(model), run(model), strict=True))


@contextmanager
def hooked(
    paths: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """`see(path, input, output)` at every call of these modules of a replica; what it returns, if anything, is the
    output. Their forwards are wrapped: `norm.forward(x)` runs no hook. What a run itself puts around a forward, as a
    checkpoint that is decompressed with it, stays behind."""
    watching = [True]
    own: dict[str, Any] = {}
    before: dict[str, Any] = {path: module.__dict__.get("forward") for path, module in paths.items()}

    def wrapped(path: str, module: nn.Module) -> Callable[..., torch.Tensor]:
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            output: torch.Tensor = forward(*args, **kwargs)
            if not watching:
                return output
            changed = see(path, args[0] if args else next(iter(kwargs.values())), output)
            return output if changed is None else changed

        if not isinstance(forward, MethodType):
            return functools.wraps(forward)(watched)
        method = functools.wraps(forward.__func__)(lambda _, *args, **kwargs: watched(*args, **kwargs))
        return MethodType(method, module)  # others that wrap it ask for its `__func__`

    try:
        for path, module in paths.items():
            own[path] = module.__dict__["forward"] = wrapped(path, module)
        yield
    finally:
        watching.clear()
        for path, module in paths.items():
            if module.__dict__.get("forward") is not own.get(path):
                continue
            if before[path] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before[path]


@contextmanager
def counting(paths: Mapping[str, nn.Module]) -> Iterator[tuple[Counter[str], list[str]]]:
    """(calls by path, paths in the order of their calls) of these modules."""
    calls: Counter[str] = Counter()
    order: list[str] = []

    def count(path: str, entered: torch.Tensor, output: torch.Tensor) -> None:
        calls[path] += 1
        order.append(path)

    with hooked(paths, count):
        yield calls, order


@contextmanager
def permitted_rounding(paths: Mapping[str, nn.Module], seed: int) -> Iterator[None]:
    """The norms' outputs off by one ulp in as many elements as the per-site tolerance allows: the noise that a kernel
    may make, and with it what of the logits' distance says nothing about a kernel."""
    generator = torch.Generator().manual_seed(int(seed))

    def disturb(path: str, entered: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        tolerance = SITE.get(output.dtype)
        if tolerance is None or not output.numel():
            return None
        draw = torch.rand(output.shape, generator=generator, device="cpu").to(output.device)
        step = torch.where(draw < tolerance.fraction / 2, -1, torch.where(draw < tolerance.fraction, 1, 0))
        step = torch.where(torch.isfinite(output) & (output != 0), step, 0)
        raw = bits(output)
        return (raw + step.to(raw.dtype)).view(output.dtype)

    with hooked(paths, disturb):
        yield
