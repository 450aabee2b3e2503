"""Judged calls of the CUDA kernels, by the file that their kernels come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from .chains import Probe, chains, in_a_chain
from .rotations import rotated

UNEVEN = ((601, 1000), (601, 520), (5, 5128), (600, 5128), (40, 7000), (9, 9216), (9, 10000), (33, 40))
"""Rows and columns: two rows to a CTA, columns of which the threads, or the CTAs of a cluster, have unequal parts."""


def _norms(streamed: bool) -> Iterator[Probe]:
    """Every axis that the kernels are compiled for, and a length and row count of each regime. streamed: rows that are
    longer than the registers of a multiprocessor of a GPU without clusters, by the schedules of such a GPU."""
    from benchlib.kernel_cases import BF16, FP16, FP32, SPECS, Case, Variant, fault_in

    from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, NormSpec

    fused, alone, in_place = "fused_add_rms_norm", "rms_norm", "fused_add_rms_norm_"
    weightless, offset, rounded, wide, width, group = SPECS[4:]
    table = [
        (fused, LLAMA, BF16, BF16, 4096, 600, "dense", "last columns"),
        (in_place, LLAMA, BF16, BF16, 5125, 5, "padded", ""),
        (alone, GEMMA, FP16, FP16, 111, 33, "dense", "nan"),
        (fused, LLAMA, FP32, FP32, 1024, 17, "dense", "zeros"),
        (fused, LLAMA, BF16, BF16, 4096, 2, "offset", ""),
        (fused, LLAMA, BF16, BF16, 8192, 3, "dense", "last columns"),
        (in_place, wide, FP16, FP16, 2880, 129, "dense", "last columns"),
        (alone, weightless, BF16, BF16, 64, 2100, "two levels", ""),
        (fused, offset, BF16, BF16, 768, 9, "two levels", "inf"),
        (alone, width, BF16, BF16, 769, 9, "dense", ""),
        (alone, group, BF16, BF16, 1024, 9, "dense", ""),
        (fused, rounded, BF16, FP32, 2052, 100, "padded", ""),
        (in_place, LLAMA, BF16, BF16, 16384, 40, "dense", "last columns"),
        (alone, LLAMA, FP16, FP16, 7, 257, "offset", ""),
        (fused, LLAMA, BF16, BF16, 65536, 5, "dense", "last columns"),
        (alone, GEMMA, FP16, FP16, 131072, 3, "padded", "last columns"),
        (fused, LLAMA, BF16, FP32, 4096, 300, "dense", "last columns"),
        (alone, LLAMA, FP32, FP32, 111, 9, "offset", ""),
        (alone, LLAMA, BF16, FP32, 8192, 2100, "dense", ""),
        (in_place, LLAMA, BF16, BF16, 8192, 600, "padded", "last columns"),
        (alone, group, BF16, BF16, 4096, 64, "padded", "last columns"),
        (fused, LLAMA, FP32, FP32, 16384, 33, "padded", "last columns"),
        (alone, GEMMA, BF16, BF16, 1600, 129, "offset", "last columns"),
        (alone, LLAMA, FP32, BF16, 2052, 17, "dense", "nan"),
        (alone, NormSpec(width=101), BF16, BF16, 1024, 9, "dense", ""),
        (fused, NormSpec(width=101), FP32, FP32, 1024, 9, "dense", ""),
        # results twice as wide as rows that a few lanes of a warp have, and a last CTA that has rows to spare
        (fused, LLAMA, BF16, FP32, 64, 37, "dense", ""),
        (alone, LLAMA, FP16, FP32, 8, 1037, "dense", ""),
        # rows that come by two to a CTA, and parts of a row that are not equal, in one CTA and in clusters
        (fused, LLAMA, BF16, BF16, 1000, 515, "dense", ""),
        (alone, LLAMA, BF16, BF16, 1600, 515, "dense", "last columns"),
        (in_place, LLAMA, BF16, BF16, 520, 601, "dense", "last columns"),
        (fused, LLAMA, BF16, BF16, 5128, 5, "padded", "last columns"),
        (fused, LLAMA, BF16, BF16, 7000, 20, "dense", "last columns"),
        (alone, LLAMA, BF16, BF16, 9216, 3, "dense", "last columns"),
        (fused, LLAMA, BF16, BF16, 9216, 9, "dense", "last columns"),
        (fused, LLAMA, BF16, BF16, 10000, 9, "dense", "last columns"),
        (fused, LLAMA, BF16, BF16, 20480, 9, "dense", "last columns"),
        (fused, LLAMA, BF16, BF16, 24584, 40, "dense", "last columns"),
        (fused, LLAMA, BF16, BF16, 24584, 7, "dense", "last columns"),
        (fused, LLAMA, BF16, BF16, 24584, 200, "dense", "last columns"),
        (alone, LLAMA, BF16, BF16, 5128, 600, "dense", "last columns"),
        (alone, LLAMA, BF16, BF16, 50000, 3, "dense", "last columns"),
    ]
    far = [
        (fused, LLAMA, BF16, BF16, 131072, 5, "dense", "last columns"),
        (in_place, LLAMA, BF16, BF16, 131072, 2, "padded", "last columns"),
        (alone, GEMMA, FP16, FP16, 131073, 3, "dense", ""),
        (fused, wide, BF16, BF16, 131076, 3, "two levels", "last columns"),
        (fused, LLAMA, FP32, FP32, 24449, 2, "dense", "inf"),
        (alone, weightless, FP32, FP32, 65538, 2, "offset", "zeros"),
        (alone, width, FP32, FP32, 65536, 3, "dense", "last columns"),
        (fused, rounded, BF16, FP32, 131072, 2, "dense", "nan"),
    ]
    for op, spec, dtype, weight_dtype, n, m, layout, special in far if streamed else table:
        case = Case(Variant(op, spec, dtype, weight_dtype, n, layout), m, 1e-5, 1.0, special, 1)
        yield Probe(m, lambda case=case: fault_in(case, "cuda", "cuda"), case.named, 80 if streamed else 0)
    if not streamed:  # the least numbers there are, of which each counts
        tiny = Case(Variant(alone, LLAMA, FP16, FP16, 111, "dense"), 9, 1e-18, 1e-7, "", 1)
        yield Probe(9, lambda: fault_in(tiny, "cuda", "cuda"), tiny.named)


def _anew(call: Callable[[], Any]) -> Any:
    """The results of a call in memory that holds none: the allocator has them lie where those of a call in front, which
    are spoiled, lay. What a kernel leaves unwritten would be right without this: the right source has written it.
    Registers keep what a kernel in front has left in them: those of every multiprocessor have had a product of NaN."""
    import torch

    results = call()
    for result in (results,) if isinstance(results, torch.Tensor) else results:
        if result.itemsize > 1:
            result.fill_(float("nan"))
        else:
            result.view(torch.int8).fill_(-1)
    if result.device.type == "cuda":
        nan = torch.full((4096, 4096), float("nan"), device="cuda", dtype=torch.bfloat16)
        torch.mm(nan, nan)
    del results, result
    return call()


def _adds() -> Iterator[Probe]:
    """A norm, the add behind it and the norm of that sum, against the definition with the proof's own tolerance."""
    import torch

    from rmsnorm_patch import ops
    from rmsnorm_patch.fused.norm_add.op import bind_norm_add, bind_norm_add_norm
    from rmsnorm_patch.numerics import reference
    from rmsnorm_patch.numerics.spec import GEMMA, LLAMA, NormSpec
    from rmsnorm_patch.numerics.tolerances import SITE
    from rmsnorm_patch.proof.difference import compare

    def call(m: int, n: int, spec: Any, dtype: torch.dtype = torch.bfloat16, levels: int = 1, special: str = "") -> str:
        """levels: strides of the rows, of which there are three times as many where there are two. special: "least
        numbers" are those of the sum."""
        torch.manual_seed(1)
        shape = (m, n) if levels == 1 else (m, 5, n + 24)
        x, residual = (torch.randn(*shape, device="cuda").to(dtype)[..., :n] for _ in range(2))
        x, residual = (each if levels == 1 else each[:, :3] for each in (x, residual))
        x[..., :-8] *= 1e-2  # energy in the last columns
        drawn = (torch.rand(n, device="cuda").to(dtype) + 0.5 for _ in range(2))
        weight, following = drawn if spec.has_weight else (None, None)
        next_eps = 1e-3
        if special == "least numbers":  # each counts: so would one in a chunk that is not there
            weight, residual, next_eps = weight * 1e-7, residual * 1e-7, 1e-18
        if dtype == torch.float32:  # nothing rounds before the add: where a sum cancels, its ulps are not the norm's
            residual = residual.abs().copysign(x)
        kept = x.clone(), residual.clone()
        both = bind_norm_add_norm(spec, "cuda")
        normed, total = _anew(lambda: both(x, residual, weight, 1e-6, following, next_eps))
        alone = _anew(lambda: bind_norm_add(spec, "cuda")(x, residual, weight, 1e-6))
        want_total = reference.rms_norm(x, weight, spec, 1e-6) + residual
        want = reference.rms_norm(total, following, spec, next_eps)
        if spec.sum == "fp32":
            first = ops.bind_rms_norm(spec, "cuda")(x, weight, 1e-6)
            want = reference.fused_add_rms_norm(first, residual, following, spec, next_eps)[0]
        for got, wanted in ((normed, want), (total, want_total)):
            wrong = compare(got, wanted).violations(SITE[dtype], dtype)
            if wrong:
                return wrong[0]
        return _differ((alone, total), (x, kept[0]), (residual, kept[1]))

    even = ((33, 2304, GEMMA), (2, 4096, LLAMA), (600, 3584, GEMMA), (5, 16384, LLAMA), (130, 128, LLAMA))
    uneven = tuple((m, n, LLAMA) for m, n in UNEVEN)
    fp32_sum = NormSpec(round_before_weight="none", output="input", sum="fp32")
    for given in (
        *even,
        *uneven,
        (33, 2304, fp32_sum),
        (33, 1000, LLAMA, torch.float32),
        (9, 1600, GEMMA, torch.float16),
        (9, 4096, NormSpec(has_weight=False), torch.bfloat16, 2),
        (200, 128, LLAMA, torch.bfloat16, 2),
        (33, 40, LLAMA, torch.float16, 1, "least numbers"),
        (9, 520, LLAMA, torch.float16, 1, "least numbers"),
    ):
        m = given[0] * (3 if given[4:5] == (2,) else 1)
        yield Probe(m, lambda a=given: call(*a), f"norm and add {' '.join(map(str, given))}")


def _gated() -> Iterator[Probe]:
    """Norms with a gate, in each order and with each activation, against the definition."""
    import torch

    from rmsnorm_patch.fused.gated_norm import op
    from rmsnorm_patch.numerics.gating import ACTIVATIONS, ORDERS, GateSpec, gated_rms_norm
    from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY
    from rmsnorm_patch.numerics.tolerances import GATED
    from rmsnorm_patch.proof.difference import compare

    def call(m: int, n: int, gating: Any, gate_dtype: Any, before: int, scale: float = 1.0) -> str:
        """before: columns of a wider tensor in front of these, and as many behind. scale: of x, in fp16 where it is
        small."""
        torch.manual_seed(1)
        dtype, eps = (torch.bfloat16, 1e-6) if scale == 1.0 else (torch.float16, 1e-18)
        wide = [torch.randn(m, n + 2 * before, device="cuda") * size for size in (scale, 1.0)]
        x, gate = (each[:, before : before + n] for each in (wide[0].to(dtype), wide[1].to(gate_dtype)))
        weight, kept = torch.rand(n, device="cuda").to(dtype) + 0.5, (x.clone(), gate.clone())
        got = _anew(lambda: op.bind(FP32_WEIGHT_MULTIPLY, gating, "cuda")(x, gate, weight, eps))
        want = gated_rms_norm(x, gate, weight, FP32_WEIGHT_MULTIPLY, gating, eps)
        wrong = compare(got, want).violations(GATED[x.dtype], x.dtype)
        return wrong[0] if wrong else _differ((x, kept[0]), (gate, kept[1]))

    sizes = ((33, 128), (5, 2048), (600, 4096), (2, 8192), *UNEVEN)
    for (m, n), order in ((size, order) for size in sizes for order in ORDERS):
        for activation in tuple(ACTIVATIONS)[: None if n in (128, 1000) else 1]:
            gating = GateSpec(activation, order)
            yield Probe(m, lambda a=(m, n, gating, torch.bfloat16, 0): call(*a), f"gated {m} {n} {gating}")
    for before, order in ((before, order) for before in (2, 4) for order in ORDERS):  # in pieces of 4 and of 8 bytes
        for dtype in (torch.bfloat16, torch.float32):
            given = 33, 2048, GateSpec("silu", order), dtype, before
            yield Probe(33, lambda a=given: call(*a), f"gated 33 2048 {given[2]} {dtype} behind {before}")
    for m, n in ((33, 40), (9, 520)):  # the least numbers there are, in rows with chunks that are not there
        given = m, n, GateSpec("silu", "norm_first"), torch.float16, 0, 1e-7
        yield Probe(m, lambda a=given: call(*a), f"gated {m} {n} of the least numbers")


def _differ(*pairs: tuple[Any, Any]) -> str:
    import torch

    bad = [i for i, (got, want) in enumerate(pairs) if not torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))]
    return f"results {bad} differ" if bad else ""


def _pairs() -> Iterator[Probe]:
    """Queries and keys in one launch, against the definition with the proof's own tolerance."""
    import torch

    from rmsnorm_patch.fused.query_key_norm import kernel
    from rmsnorm_patch.numerics import reference
    from rmsnorm_patch.numerics.spec import GEMMA, LLAMA
    from rmsnorm_patch.numerics.tolerances import SITE
    from rmsnorm_patch.proof.difference import compare

    def call(tokens: int, n: int, spec: Any) -> str:
        torch.manual_seed(1)
        heads = torch.randn(tokens, 48, n, device="cuda").bfloat16()
        weights = [torch.rand(n, device="cuda").bfloat16() + 0.5 for _ in range(2)]
        first = 32 if n < 500 else 31  # odd numbers of rows, where a CTA takes two
        given = heads[:, :first], heads[:, first:40]
        kept = heads.clone()
        results = _anew(lambda: kernel.bind_rms_norm_pair(spec)(*given, *weights, 1e-6))
        for got, x, weight in zip(results, given, weights, strict=True):
            wrong = compare(got, reference.rms_norm(x, weight, spec, 1e-6)).violations(SITE[x.dtype], x.dtype)
            if wrong:
                return wrong[0]
        return _differ((heads, kept))

    sizes = ((33, 128, LLAMA), (1, 128, GEMMA), (300, 64, LLAMA), (5, 256, LLAMA), (3, 1000, LLAMA), (7, 520, GEMMA))
    for tokens, n, spec in sizes:
        yield Probe(tokens * 40, lambda t=tokens, n=n, s=spec: call(t, n, s), f"pair {tokens} {n}")


def _partials() -> Iterator[Probe]:
    """Parts of a product, against their sum and the definition."""
    import torch

    from rmsnorm_patch.fused.linear_norm import kernel
    from rmsnorm_patch.numerics import reference
    from rmsnorm_patch.numerics.spec import LLAMA, NormSpec
    from rmsnorm_patch.numerics.tolerances import SITE
    from rmsnorm_patch.proof.difference import compare

    wide = NormSpec(round_before_weight="none", output="input", sum="fp32")

    def call(m: int, n: int, parts: int, spec: Any) -> str:
        torch.manual_seed(1)
        pieces = torch.randn(parts, m, n, device="cuda")
        padded, weight = torch.randn(m + 1, n, device="cuda").bfloat16(), torch.rand(n, device="cuda").bfloat16() + 0.5
        behind, total = padded[m].clone(), pieces[0]
        for piece in pieces[1:]:
            total = total + piece
        want, summed = reference.fused_add_rms_norm(total.bfloat16(), padded[:m].clone(), weight, spec, 1e-6)
        normed = torch.full((m + 1, n), float("nan"), device="cuda").bfloat16()
        kernel.bound(spec, parts)(pieces, padded[:m], weight, 1e-6, normed[:m])
        wrong = compare(normed[:m], want).violations(SITE[want.dtype], want.dtype)
        if wrong or not bool(normed[m].isnan().all()):
            return "".join(wrong) or "a row too many"
        return _differ((padded[:m], summed), (padded[m], behind))

    even = ((5, 4096, 2, LLAMA), (33, 4096, 3, wide), (1, 2048, 8, LLAMA), (16, 8192, 4, wide))
    uneven = tuple((m, n, 2, LLAMA) for m, n in ((5, 1000), (16, 5128), (9, 10000), (40, 20480), (9, 24584), (16, 40)))
    for m, n, parts, spec in even + uneven:
        yield Probe(m, lambda a=(m, n, parts, spec): call(*a), f"parts {m} {n} {parts}")


def _made(special: str, x: Any, residual: Any, weight: Any) -> None:
    """Turn operands into those of a special case."""
    import torch

    if special == "last columns":  # what is largest lies in a part of the row that the first threads do not read
        weight[-8:] = 2.0**30
    elif special == "beyond the bound":  # so far that the quotient is infinite
        weight[::7] = 2.0**124
    elif special == "largest of one":
        x.copy_(torch.where(x < 0, -1.0, 1.0))
        residual.zero_()
        weight.fill_(1.0)
    elif special == "quotients beside ties":  # of e4m3, in steps of the least scale, which is no power of two
        middles = (torch.arange(8, device="cuda", dtype=torch.float64) + 8.5) / 8
        beside = 1 + torch.arange(-6, 27, device="cuda", dtype=torch.float64) * 2.0**-23
        sizes = 2.0 ** torch.arange(-6, 8, device="cuda", dtype=torch.float64) / (448 * 512)
        found = (middles[:, None, None] * sizes[:, None] * beside).flatten()
        x.fill_(1.0)
        residual.zero_()
        weight.zero_()
        weight[: len(found)] = found.float()


def _quantised() -> Iterator[Probe]:
    """Quantised rows, to the bit of quantising what the definition gives where its norm agrees to the bit."""
    import torch

    from rmsnorm_patch import ops
    from rmsnorm_patch.fused.norm_quantised.op import quant_args
    from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise
    from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec

    def call(
        m: int, n: int, quant: Any, spec: Any, both: bool, dtype: torch.dtype = torch.bfloat16, special: str = ""
    ) -> str:
        torch.manual_seed(1)
        x, residual = (torch.randn(m, n, device="cuda").to(dtype) for _ in range(2))
        if m >= 10:
            x[0], x[3], x[4], residual[0] = 0, x[3] * 1e30, x[4] * 1e-38, 0
            x[1, 5], x[2, 7], x[6, 3] = float("inf"), float("nan"), -float("inf")
        weight = torch.rand(n, device="cuda") + 0.5
        # each group of columns, and with it each scale, is of another size, down to below every bound
        sizes = torch.randint(-40, 12, (1 + n // 128,), device="cuda")
        weight = (weight * 2.0 ** sizes.repeat_interleave(128)[:n]).to(dtype)
        _made(special, x, residual, weight)
        given = torch.tensor([0.037 if quant.scheme == "fp8_static" else 1.5], device="cuda")
        scale = given if quant.scheme == "fp8_static" or (both and quant.scheme == "fp8_token") else None
        wanted, total = ops.bind_fused_add_rms_norm(spec, "cuda")(x, residual, weight, 1e-6)
        values = wanted
        if quant.value != "rounded":
            wide = replace(spec, output="promote")
            values = ops.bind_fused_add_rms_norm(wide, "cuda")(x, residual, weight.float(), 1e-6)[0]
        want, want_scales = quantise(values, quant, scale)
        rest = (weight, scale, quant.scheme, 1e-6, *ops.spec_args(spec, "cuda"), *quant_args(quant, both))

        def quantised() -> tuple[torch.Tensor, ...]:
            kept = residual.clone()
            return kept, *torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, kept, *rest)

        kept, found, scales, second = _anew(quantised)
        pairs = [(kept, total), (found.view(torch.uint8), want.view(torch.uint8)), (scales, want_scales)]
        return _differ(*pairs, *([(second, wanted)] if both else ()))

    fp32_sum = NormSpec(round_before_weight="none", output="input", sum="fp32")
    token, int8 = QuantSpec("fp8_token"), QuantSpec("int8_token")
    kinds = (
        (QuantSpec("fp8_static"), LLAMA),
        (QuantSpec("fp8_static", "fp32", "native"), FP32_WEIGHT_MULTIPLY),
        (token, fp32_sum),
        (QuantSpec("fp8_token", "fp32", "native"), FP32_WEIGHT_MULTIPLY),
        (QuantSpec("fp8_block"), GEMMA),
        (QuantSpec("fp8_block", "fp32", "native", "column_major", True), FP32_WEIGHT_MULTIPLY),
        (QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True), fp32_sum),
        (int8, LLAMA),
        (QuantSpec("int8_token", "fp32", "separate"), FP32_WEIGHT_MULTIPLY),
    )
    for quant, spec in kinds:
        yield Probe(33, lambda a=(33, 4096, quant, spec, False): call(*a), f"quantised 33 4096 {quant}")
    fp16 = torch.float16
    uneven = [(m, n, *kind, True) for m, n in UNEVEN for kind in (kinds[3], kinds[6], kinds[7])]
    for given in (
        *uneven,
        (17, 4096, token, LLAMA, True),
        (3, 16384, token, LLAMA, True),
        (40, 16384, *kinds[6], False),
        (200, 8192, int8, LLAMA, False),
        (5, 32768, *kinds[3], True),
        (300, 2880, *kinds[0], False),
        (1029, 64, *kinds[2], False),
        (100, 1000, int8, LLAMA, True),
        (1029, 1000, *kinds[4], True),
        (700, 999, token, LLAMA, True, fp16),
        (3, 1002, int8, LLAMA, False, fp16),
        (3, 8192, *kinds[5], False),
        # rows whose values are computed again for the second pass over them
        (600, 16384, *kinds[3], False),
        (600, 32768, *kinds[3], False),
        (40, 7000, int8, LLAMA, False, torch.bfloat16, "last columns"),
        (3, 16384, int8, LLAMA, False, torch.bfloat16, "last columns"),
        (5, 4096, token, LLAMA, True, torch.bfloat16, "beyond the bound"),
        (5, 4096, QuantSpec("int8_token", "rounded", "separate"), LLAMA, False, torch.bfloat16, "largest of one"),
        (5, 4096, *kinds[5], False, torch.float32, "quotients beside ties"),
    ):
        yield Probe(given[0], lambda a=given: call(*a), f"quantised, {' '.join(map(str, given[:3]))} {given[4:]}")


def _silu() -> Iterator[Probe]:
    """silu(gate) * up, quantised, to the bit of the definition; and a chain of launches, each of which reads what the
    one in front has written."""
    import torch

    from rmsnorm_patch.fused.silu_quantised.op import silu_args
    from rmsnorm_patch.numerics.quantisation import QuantSpec
    from rmsnorm_patch.numerics.silu import SILUS, silu_and_mul_quantised

    def run(x: torch.Tensor, silu: Any, quant: QuantSpec) -> tuple[Any, Any]:
        given = torch.tensor([0.037], device="cuda") if quant.scheme == "fp8_static" else None
        op = torch.ops.rmsnorm_patch.silu_and_mul_quantised
        found = op(x, given, quant.scheme, *silu_args(silu, quant), "cuda")
        return found, silu_and_mul_quantised(x, silu, quant, given)

    def call(m: int, n: int, silu: Any, quant: QuantSpec, apart: int = 0) -> str:
        torch.manual_seed(1)
        x = torch.randn(m, 2 * n + apart, device="cuda").to(torch.bfloat16)[:, : 2 * n]
        sizes = torch.randint(-20, 6, (1 + n // 128,), device="cuda")
        x[:, n:] *= (2.0 ** sizes.repeat_interleave(128)[:n]).to(torch.bfloat16)
        if m >= 5:
            x[0], x[1, 3], x[2, 5], x[4, n - 1] = 0, float("nan"), float("inf"), -120.0
        (rows, scales), (want, want_scales) = run(x, silu, quant)
        return _differ((rows.view(torch.uint8), want.view(torch.uint8)), (scales, want_scales))

    def chained(m: int, n: int) -> str:
        def step(x: torch.Tensor) -> torch.Tensor:
            (rows, _), _ = run(x, "rounded", QuantSpec("fp8_token"))
            return torch.cat([rows, rows.flip(-1)], -1).view(torch.uint8).to(torch.bfloat16) / 64 - 1

        return in_a_chain(step, torch.randn(m, 2 * n, device="cuda").to(torch.bfloat16))

    kinds = (
        QuantSpec("fp8_static"),
        QuantSpec("fp8_token", "fp32", "native"),
        QuantSpec("fp8_block", "fp32", "fused", "column_major"),
        QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True),
        QuantSpec("int8_token", arithmetic="separate"),
    )
    for m, n in ((33, 4096), (7, 14336), (300, 14336), (1029, 64), (700, 768), (9, 9728), (3, 28680), (70, 28680)):
        for place, quant in enumerate(kinds):
            given = (m, n, SILUS[place % 3], quant)
            yield Probe(m, lambda a=given: call(*a), f"silu, {m} {n} {quant}")
    for m, n, apart in ((9, 4096, 1), (9, 14336, 2), (300, 8192, 4)):
        given = (m, n, "rounded", kinds[1], apart)
        yield Probe(m, lambda a=given: call(*a), f"silu, {m} {n} of rows {apart} longer")
    for m, n in ((300, 14336), (8, 14336)):
        yield Probe(m, lambda m=m, n=n: chained(m, n), f"silu behind silu {m} {n}")


MAKERS: dict[str, Callable[[], Iterator[Probe]]] = {
    "rms_norm_rows.cu": lambda: chain(_norms(streamed=False), chains("norm")),
    "rms_norm_stream.cu": lambda: chain(_norms(streamed=True), chains("streamed")),
    "rms_norm_pair.cu": lambda: chain(_pairs(), chains("pair")),
    "rms_norm_rotated.cu": lambda: chain(rotated(), chains("rotated")),
    "rms_norm_partials.cu": lambda: chain(_partials(), chains("parts")),
    "rms_norm_quantised.cu": lambda: chain(_quantised(), chains("quantised")),
    "rms_norm_add.cu": lambda: chain(_adds(), chains("add")),
    "rms_norm_gated.cu": lambda: chain(_gated(), chains("gated")),
    "silu_and_mul_quantised.cu": _silu,
}
"""Kernel file -> its probes."""
