"""Random calls of the norms' ops, each judged: against fp64, the reference's roundings, canaries and poisoned results.

`drawn(variant, seed)` is one call of a variant (op, spec, dtypes, row length); `fault_in(case)` makes it and says what
is wrong with it. The same cases run on a GPU and, with the interpreted Triton kernels, on a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rmsnorm_patch import ops
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec
from rmsnorm_patch.numerics.tolerances import SITE
from rmsnorm_patch.proof.difference import compare

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CANARY = 1234.0
LAST = 8
"""Columns that a case of "last columns" leaves large."""
SPECS = (
    LLAMA,
    FP32_WEIGHT_MULTIPLY,
    GEMMA,
    T5,
    NormSpec(has_weight=False),
    NormSpec(weight_offset="weight_dtype"),
    NormSpec(output="input"),
    NormSpec(sum="fp32", round_before_weight="none", output="input"),
    NormSpec(width=100),
    NormSpec(group=64),
)
LENGTHS = (1, 7, 64, 96, 111, 128, 192, 256, 513, 576, 768, 769, 896, 1024, 1536, 1600, 2048, 2052, 2560, 2880, 3072,
           3584, 4096, 4098, 5120, 5125, 6144, 7168, 8192, 9216, 12288, 16384, 20480, 24449, 32768, 65536)  # fmt: skip
DTYPES = ((BF16, BF16), (BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32))
OPS = ("rms_norm", "fused_add_rms_norm", "fused_add_rms_norm_")
LAYOUTS = ("dense", "dense", "offset", "padded", "two levels")
ELEMENTS = 1 << 22
"""At most in one call."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. layout: how operands lie beside the dense ones."""

    op: str
    spec: NormSpec
    dtype: torch.dtype
    weight_dtype: torch.dtype
    n: int
    layout: str


@dataclass(frozen=True)
class Case:
    """One call. rows: [M] or, in two levels, [M, 3]. scale: of the values. special: what stands in the first rows."""

    variant: Variant
    m: int
    eps: float
    scale: float
    special: str
    seed: int

    @property
    def named(self) -> str:
        v = self.variant
        return f"{v.op} {v.spec} {v.dtype} {v.weight_dtype} {self.m}x{v.n} {v.layout} eps={self.eps} scale={self.scale} {self.special} seed={self.seed}"  # noqa: E501


def variants(count: int, seed: int) -> list[Variant]:
    """`count` different variants that have a kernel."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        op, spec, n = draw.choice(OPS), draw.choice(SPECS), draw.choice(LENGTHS)
        dtype, weight_dtype = draw.choice(DTYPES)
        if (spec.group and n % spec.group) or (spec.width and n <= spec.width):
            continue
        if op.endswith("_") and spec.output_dtype(dtype, weight_dtype if spec.has_weight else None) != dtype:
            continue
        if op == "rms_norm" and spec.sum == "fp32":
            continue
        found[Variant(op, spec, dtype, weight_dtype, n, draw.choice(LAYOUTS))] = None
    return list(found)


def drawn(variant: Variant, seed: int) -> Case:
    draw = random.Random(f"{variant} {seed}")
    most = max(1, ELEMENTS // variant.n)
    m = min(most, draw.choice((1, 2, 3, 4, 5, 8, 16, 17, 31, 33, 64, 100, 129, 257, 600, 1025, 2100)))
    eps = draw.choice((1e-6, 1e-5, 1e-6, 0.25))
    scale = draw.choice((1.0, 1.0, 1e-3, 30.0))
    return Case(variant, m, eps, scale, draw.choice(("", "", "zeros", "nan", "inf", "last columns")), seed)


class Guarded:
    """Rows of values inside an allocation full of canaries, which must stay as they are."""

    def __init__(self, case: Case, device: str, generator: torch.Generator, written: bool) -> None:
        v = case.variant
        levels = (case.m, 3) if v.layout == "two levels" else (case.m,)
        padding = 0 if v.layout in ("dense", "offset") else 24
        start = (3 if v.layout == "offset" else 0) + 4 * (v.n + padding)  # rows before the first
        shape = (*levels, v.n)
        strides = [v.n + padding]
        if len(levels) == 2:
            strides = [5 * strides[0], strides[0]]
        size = start + sum(s * (k - 1) for s, k in zip(strides, levels, strict=True)) + 5 * (v.n + padding)
        self.memory = torch.full((size,), CANARY, dtype=v.dtype, device=device)
        self.rows = self.memory.as_strided(shape, (*strides, 1), start)
        values = torch.randn(shape, generator=generator, device=device) * case.scale
        flat = values.view(-1, v.n)
        if case.special == "zeros":
            flat[0] = 0
        elif case.special in ("nan", "inf"):
            flat[-1, v.n // 2] = float(case.special)
        elif case.special == "last columns":
            flat[:, : -min(LAST, v.n)] *= 1e-3
        self.rows.copy_(values)
        self.written = written

    def broken(self) -> torch.Tensor:
        """Whether anything but the rows changed; call it once the rows are no longer needed."""
        self.rows.fill_(CANARY)
        return (self.memory != CANARY).any()


def _poison(case: Case, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Neighbours that must keep their canaries, and blocks of NaN which the allocator gives to the results."""
    v = case.variant
    shape = (case.m * (3 if v.layout == "two levels" else 1), v.n)
    result = v.spec.output_dtype(v.dtype, v.weight_dtype if v.spec.has_weight else None)
    dtypes = [v.dtype] * 5 + ([result] * 3 if result != v.dtype else [])
    blocks = [torch.full(shape, CANARY, dtype=dtype, device=device) for dtype in dtypes]
    for block in blocks[1::2]:
        block.fill_(float("nan"))
    return blocks[::2], blocks[1::2]


Op = Callable[..., Any]


def fault_in(case: Case, backend: str, device: str, bind: Callable[[str, NormSpec, str], Op] | None = None) -> str:
    """What is wrong with one call, or "". bind: what makes the op, for tests; default `ops.bind`."""
    v, bound = case.variant, (bind or _bind)(case.variant.op, case.variant.spec, backend)
    generator = torch.Generator(device).manual_seed(case.seed)
    x = Guarded(case, device, generator, v.op.endswith("_"))
    residual = Guarded(case, device, generator, v.op.endswith("_"))
    weight = None
    if v.spec.has_weight:
        weight = torch.rand(v.n, generator=generator, device=device) + 0.5
        weight = (weight - float(v.spec.weight_offset != "none")).to(v.weight_dtype)
    kept_x, kept_residual = x.rows.clone(), residual.rows.clone()
    neighbours, poison = _poison(case, device)
    del poison
    total = want_total = None
    if v.op == "rms_norm":
        normed = bound(x.rows, weight, case.eps)
        want = reference.rms_norm(kept_x, weight, v.spec, case.eps)
        summed = kept_x
    else:
        want, want_total = reference.fused_add_rms_norm(kept_x, kept_residual, weight, v.spec, case.eps)
        summed = want_total if v.spec.sum == "rounded" else kept_x.float() + kept_residual.float()
        if x.written:
            bound(x.rows, residual.rows, weight, case.eps)
            normed, total = x.rows.clone(), residual.rows.clone()
        else:
            normed, total = bound(x.rows, residual.rows, weight, case.eps)
    judged = _Judged()
    judged.values(normed, want, summed, weight, case)
    if total is not None and want_total is not None:
        judged.flag(_differ(total, want_total), "the sum is not x + residual")
    if not x.written:
        changed = _differ(x.rows, kept_x) | _differ(residual.rows, kept_residual)
        judged.flag(changed, "an operand was written")
    outside = torch.stack([x.broken(), residual.broken(), *((block != CANARY).any() for block in neighbours)])
    judged.flag(outside.any(), "something was written outside")
    return "; ".join(judged.found())


def _bind(op: str, spec: NormSpec, backend: str) -> Op:
    return ops.bind(op, spec, backend)  # type: ignore[arg-type]


def _differ(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Whether any two elements differ; NaN equals NaN."""
    return ((left != right) & ~(left.isnan() & right.isnan())).any()


class _Judged:
    """Findings about one call. A device is waited for once: many processes share it, and each wait is a turn at it."""

    def __init__(self) -> None:
        self._flags: list[tuple[torch.Tensor, str]] = []
        self._apart: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._measured: torch.Tensor | None = None
        self._said: list[str] = []
        self._relative = 0.0

    def flag(self, wrong: torch.Tensor, words: str) -> None:
        self._flags.append((wrong, words))

    def values(
        self, got: torch.Tensor, want: torch.Tensor, summed: torch.Tensor, weight: torch.Tensor | None, case: Case
    ) -> None:
        """Against the reference with its roundings, and against fp64 with the reference's own error as the measure."""
        if got.dtype != want.dtype or got.shape != want.shape:
            self._said.append(f"{got.dtype} {tuple(got.shape)} in place of {want.dtype} {tuple(want.shape)}")
            return
        spec, dtype = case.variant.spec, case.variant.dtype
        got, want, summed = (t.reshape(-1, t.shape[-1]) for t in (got, want, summed))
        misplaced = (got.isfinite() != want.isfinite()).any()
        self.flag(misplaced, "NaN or infinity in another place than the reference has them")
        if got.dtype == dtype:
            self._apart += [(got[:, part], want[:, part]) for part in _parts(got, case)]
        rows = summed.isfinite().all(-1) & want.isfinite().all(-1)
        exact = reference.rms_norm_fp64(summed, weight, spec, case.eps)
        squares = (torch.where(rows[:, None], y, 0).square().sum() for y in (got - exact, want - exact, exact))
        self._measured = torch.stack([*squares, (rows.sum() * got.shape[-1]).double()])
        self._relative = torch.finfo(spec.rounded_dtype(dtype, None if weight is None else weight.dtype)).eps

    def found(self) -> list[str]:
        """What is wrong, in words."""
        differ = [(got != want).any() for got, want in self._apart]
        told = torch.stack([*(wrong for wrong, _ in self._flags), *differ]).tolist()
        said = [*self._said, *(words for wrong, (_, words) in zip(told, self._flags, strict=False) if wrong)]
        if said:  # elements that are not there, or not finite, are no distance apart
            return said
        for differs, (got, want) in zip(told[len(self._flags) :], self._apart, strict=True):
            said += compare(got, want).violations(SITE[got.dtype], got.dtype) if differs else ()
        return [*said, *self._far_from_exact()]

    def _far_from_exact(self) -> Iterator[str]:
        if self._measured is not None:
            *squares, count = self._measured.tolist()
            error, own, size = ((square / max(count, 1.0)) ** 0.5 for square in squares)
            step = self._relative * size * max(count, 1.0) ** -0.5
            if not error <= 1.05 * own + step + 8 * 2.0**-24 * size:
                yield f"rms error {error:.3e} against fp64, the reference's own {own:.3e}"


def _parts(got: torch.Tensor, case: Case) -> list[slice]:
    """Columns that the bounds of a proof are held to. Large columns are judged apart from small ones: one permitted
    flip in them moves the scale of a whole result by more than it may among as many elements of one size."""
    if case.special == "last columns" and got.shape[-1] > LAST:
        return [slice(None, -LAST), slice(-LAST, None)]
    return [slice(None)]
