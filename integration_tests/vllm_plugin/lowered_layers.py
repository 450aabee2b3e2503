"""Graphs made by hand as vLLM's manager of passes leaves them; needs no vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rmsnorm_patch import ops
from rmsnorm_patch.fused.linear_norm import op  # noqa: F401  registers the joined op
from rmsnorm_patch.vllm_plugin.decision import SPECS

aten = torch.ops.aten
NORM = torch.ops.rmsnorm_patch.fused_add_rms_norm_.default
JOINED = torch.ops.rmsnorm_patch.linear_fused_add_rms_norm_.default
BF16 = torch.bfloat16
SPEC_ARGS = ops.spec_args(SPECS["rmsnorm_patch"])[:4]
M, N, K = 5, 64, 96


class Layer:
    """A graph as vLLM's manager leaves it, each node with its value's shape. tensors: what it can be called with."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.tensors: list[torch.Tensor] = []
        self.rows, self.matrix = self.input("rows", M, K), self.input("matrix", N, K)
        self.residual, self.weight = self.input("residual", M, N), self.input("weight", N)

    def input(self, name: str, *shape: int, dtype: torch.dtype = BF16) -> fx.Node:
        generator = torch.Generator().manual_seed(len(self.tensors))
        self.tensors.append(torch.randn(shape, generator=generator).to(dtype))
        node = self.graph.placeholder(name)
        node.meta["val"] = self.tensors[-1].to("meta")
        return node

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
        return node

    def product(self, rows: fx.Node, matrix: fx.Node) -> fx.Node:
        return self.call(aten.mm.default, rows, self.call(aten.permute.default, matrix, [1, 0]))

    def norm(self, x: fx.Node, residual: fx.Node, eps: float = 1e-5) -> fx.Node:
        return self.graph.call_function(NORM, (x, residual, self.weight, eps, *SPEC_ARGS))

    def made(self, *results: fx.Node) -> Layer:
        self.graph.output(results)
        self.graph.lint()
        return self

    def targets(self) -> list[Any]:
        return [node.target for node in self.graph.nodes if node.op == "call_function"]

    def joined(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.target is JOINED]

    def run(self) -> tuple[torch.Tensor, ...]:
        """The results, and what became of the inputs."""
        tensors = [tensor.clone() for tensor in self.tensors]
        return (*fx.GraphModule(torch.nn.Module(), self.graph)(*tensors), *tensors)


def layer(with_clone: bool) -> Layer:
    """A norm behind its product; its result goes to the next product and out."""
    made = Layer()
    following = made.input("following", 32, N)
    x = made.product(made.rows, made.matrix)
    if with_clone:
        x = made.call(aten.clone.default, x)
    made.norm(x, made.residual)
    return made.made(made.product(x, following), x, made.residual)


def same_bits(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(left, right, strict=True))
