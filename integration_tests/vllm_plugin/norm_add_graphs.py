"""Graphs with norms in front of residual-adds, and what the pass that joins them must leave of them; needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from quantised_graphs import BF16, INDUCTOR, Made, N, norm
from torch._inductor import config as inductor

from rmsnorm_patch import ops
from rmsnorm_patch.numerics.spec import NormSpec
from rmsnorm_patch.vllm_plugin.decision import SPECS
from rmsnorm_patch.vllm_plugin.passes import norm_add

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
    count = norm_add.fuse(made.graph)
    assert ours(made) == list(want)
    assert count == sum("rms_norm_add" in target for target in want)
    assert same(made.run(), before)


def compiled(forward: Forward, fuse: bool, inputs: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], list[str]]:
    """The results of Inductor's code for `forward`, with the pass or without, and our ops in its graph."""
    found: list[str] = []

    def change(graph: Any) -> None:
        if fuse:
            norm_add.fuse(graph)
        found.extend(str(node.target) for node in graph.nodes if str(node.target).startswith("rmsnorm_patch."))

    torch._dynamo.reset()
    with inductor.patch(post_grad_custom_post_pass=change, force_disable_caches=True), torch.no_grad():
        return list(torch.compile(forward, fullgraph=True)(*(tensor.clone() for tensor in inputs))), found


def layers(x: Any, residual: Any, weight: Any, following: Any, matrix: Any, number: Any) -> Any:
    """Sites of every kind, between arithmetic that the compiler fuses with whatever it can."""
    scaled = residual * number
    total = scaled + rms((scaled * 2) @ matrix, weight)  # the compiler makes the residual anew
    first = (total * number) @ matrix  # and fuses this with the sum
    total = residual + rms(first, following)
    rows, total = norm(rms(total @ matrix, weight), total, following, INDUCTOR, "functional")
    total = total + rms(torch.nn.functional.silu(rows @ matrix), weight)
    return rms(total, following), total * number, total.relu()
