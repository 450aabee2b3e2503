"""Graphs with norms in front of residual-adds, and what the pass that joins them must leave of them; needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from quantised_graphs import BF16, INDUCTOR, Made, N

from rmsnorm_patch import ops
from rmsnorm_patch.numerics.spec import NormSpec
from rmsnorm_patch.vllm_plugin import norm_add_pass
from rmsnorm_patch.vllm_plugin.decision import SPECS

ADD, ADD_NORM = "rmsnorm_patch.rms_norm_add.default", "rmsnorm_patch.rms_norm_add_rms_norm.default"
PLAIN = "rmsnorm_patch.rms_norm.default"
FUSED = ("in place", "written", "functional")
OFFSET = replace(SPECS[INDUCTOR], weight_offset="fp32")
Forward = Callable[..., Any]


def rms(x: Any, weight: Any, spec: NormSpec = SPECS[INDUCTOR], eps: float = 1e-3) -> Any:
    return torch.ops.rmsnorm_patch.rms_norm(x, weight, eps, *ops.spec_args(spec))


def made_of(forward: Forward, form: str = "written") -> Made:
    """Of `forward(x, residual, weight, next_weight, matrix, number)`."""
    generator = torch.Generator().manual_seed(2)
    more = torch.randn(N, generator=generator), torch.randn(N, N, generator=generator) / 16
    return Made(forward, form, more=(*(tensor.to(BF16) for tensor in more), torch.tensor(0.3).to(BF16)))


def ours(made: Made) -> list[str]:
    return [target for target in made.targets() if target.startswith("rmsnorm_patch.")]


def sums(made: Made) -> list[str]:
    """What the norms that read a sum take of it."""
    place = [argument.name for argument in torch.ops.rmsnorm_patch.rms_norm_add_rms_norm.default._schema.arguments]
    return [node.args[place.index("sum")] for node in made.graph.nodes if str(node.target) == ADD_NORM]


def same(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(
        one.stride() == other.stride() and torch.equal(one.view(torch.int16), other.view(torch.int16))
        for one, other in zip(left, right, strict=True)
    )


def check(made: Made, *want: str) -> None:
    """The ops of ours behind the pass, and equal bits."""
    before = made.run()
    count = norm_add_pass.fuse(made.graph)
    assert ours(made) == list(want)
    assert count == sum("rms_norm_add" in target for target in want)
    assert same(made.run(), before)
