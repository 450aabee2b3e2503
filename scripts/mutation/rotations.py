"""Probes of the kernel that norms and rotates a query and its key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .chains import Probe


def rotated() -> Iterator[Probe]:
    """Against the norm alone and the rotation in plain PyTorch: in bits."""
    import torch

    from rmsnorm_patch import ops
    from rmsnorm_patch.fused.query_key_norm.rotated import bind_rms_norm_rotated
    from rmsnorm_patch.numerics.rotation import rotate
    from rmsnorm_patch.numerics.spec import GEMMA, LLAMA

    def call(batch: int, length: int, n: int, spec: Any, axis: int) -> str:
        torch.manual_seed(1)
        heads = torch.randn(batch, length, 48, n, device="cuda").bfloat16()
        weights = [torch.rand(n, device="cuda").bfloat16() + 0.5 for _ in range(2)]
        angles = [torch.randn(axis, length, n, device="cuda").bfloat16() for _ in range(2)]
        given = heads[:, :, :31], heads[:, :, 31:39]
        placed = given if axis == 2 else tuple(x.transpose(1, 2) for x in given)
        kept = heads.clone()
        results = bind_rms_norm_rotated(spec)(*placed, *weights, 1e-6, *angles, axis)
        norm = ops.bind_rms_norm(spec, "cuda")
        wanted = [
            rotate(norm(x.contiguous(), weight, 1e-6).transpose(1, 2), *angles)
            for x, weight in zip(given, weights, strict=True)
        ]
        pairs = [*zip(results, wanted, strict=True), (heads, kept)]
        bad = [at for at, (got, want) in enumerate(pairs) if not torch.equal(got, want)]
        return f"results {bad} differ" if bad else ""

    for batch, length, n, spec, axis in ((2, 17, 128, LLAMA, 2), (1, 1, 128, GEMMA, 1), (2, 30, 64, LLAMA, 2)):
        each = (batch, length, n, spec, axis)
        yield Probe(batch * length * 39, lambda each=each: call(*each), f"rotated {batch} {length} {n}")
