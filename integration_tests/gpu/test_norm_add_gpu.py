"""The kernels of an add behind a norm: every bit is that of the separate kernels; whole models; dependent launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from made_rows import rows, same
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.fused.norm_add.op import bind_norm_add, bind_norm_add_norm
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec
from rmsnorm_patch.rewrite import observe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS, NEXT_EPS = 1e-6, 1e-3
FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")
FP32_SUMS = {"fp32 sum": FP32_SUM, "fp32 sum, offset": replace(FP32_SUM, weight_offset="fp32")}
SPECS = {"llama": LLAMA, "gemma": GEMMA, "one rounding": FP32_WEIGHT_MULTIPLY, "width": NormSpec(width=100),
         "offset in the weight's dtype": NormSpec(weight_offset="weight_dtype"),
         "weightless": NormSpec(has_weight=False), **FP32_SUMS}  # fmt: skip
LENGTHS = (128, 1024, 2304, 2560, 3584, 3840, 4096, 5120, 5376, 8192, 16384)
ROWS = (1, 2, 5, 17, 33, 100, 130, 300, 600, 1029)
"""Of every schedule, and some that are no multiple of the rows of a CTA."""


def weights(n: int, dtype: torch.dtype, spec: NormSpec) -> list[torch.Tensor | None]:
    return [torch.randn(n, device="cuda").to(dtype) if spec.has_weight else None for _ in range(2)]


def check(x, residual, weight, next_weight, spec, backend="cuda"):  # type: ignore[no-untyped-def]
    normed = ops.bind_rms_norm(spec, backend)(x, weight, EPS)
    want, total = ops.bind_fused_add_rms_norm(spec, backend)(normed, residual, next_weight, NEXT_EPS)
    bound = bind_norm_add_norm(spec, backend)
    for _ in range(2):  # by the slow path, then by the launcher's
        found, found_total = bound(x, residual, weight, EPS, next_weight, NEXT_EPS)
        assert same(found_total, total)
        assert same(found, want)
        assert same(bind_norm_add(spec, backend)(x, residual, weight, EPS), total)
    return bound.why_apart(x, weight)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bits_are_those_of_the_separate_kernels(n: int, spec: NormSpec) -> None:
    for m in ROWS:
        assert check(rows(m, n, 1), rows(m, n, 2), *weights(n, BF16, spec), spec) == ""


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("n", [128, 2304, 4096, 8192])
def test_other_dtypes(dtype: torch.dtype, n: int) -> None:
    for spec in (LLAMA, GEMMA, FP32_SUM):
        for m in (1, 33, 600):
            assert check(rows(m, n, 3, dtype), rows(m, n, 4, dtype), *weights(n, dtype, spec), spec) == ""


@pytest.mark.parametrize("n", [1003, 5125, 20000, 40000])
def test_lengths_without_a_kernel_run_the_separate_ones(n: int) -> None:
    why = check(rows(3, n, 5), rows(3, n, 6), *weights(n, BF16, GEMMA), GEMMA)
    assert why


def test_few_rows_and_many_give_the_same_bits() -> None:
    for n in (3584, 5376, 16384):
        x, residual = rows(1000, n, 7), rows(1000, n, 8)
        weight, next_weight = weights(n, BF16, GEMMA)
        bound = bind_norm_add_norm(GEMMA)
        many = bound(x, residual, weight, EPS, next_weight, NEXT_EPS)
        few = bound(x[20:23], residual[20:23], weight, EPS, next_weight, NEXT_EPS)
        assert all(same(a, b[20:23]) for a, b in zip(few, many, strict=True))


def test_odd_operands() -> None:
    """Strided rows, unaligned addresses, one tensor as both operands, no rows, three dimensions."""
    n = 3584
    weight, next_weight = weights(n, BF16, GEMMA)
    wide, flat = rows(14, 2 * n, 9), rows(9, n, 10)
    check(wide[:, :n], rows(14, n, 11), weight, next_weight, GEMMA)
    check(rows(14, n, 12), wide[:, n:], weight, next_weight, GEMMA)
    check(wide.view(2, 7, 2 * n)[:, :6:2, :n], rows(6, n, 13).view(2, 3, n), weight, next_weight, GEMMA)
    check(flat, flat, weight, next_weight, GEMMA)
    store = torch.zeros(4 * n + 8, device="cuda", dtype=BF16)
    for shift in (1, 2, 4):
        odd = store[shift : shift + 4 * n].view(4, n).copy_(rows(4, n, 14))
        check(odd, rows(4, n, 15), weight, next_weight, GEMMA)
        check(rows(4, n, 16), odd, weight, next_weight, GEMMA)
        shifted = torch.zeros(n + 8, device="cuda", dtype=BF16)[shift : shift + n].copy_(weight)
        check(flat, flat + 1, shifted, next_weight, GEMMA)
        check(flat, flat + 1, weight, shifted, GEMMA)
    empty = bind_norm_add_norm(GEMMA)(flat[:0], flat[:0], weight, EPS, next_weight, NEXT_EPS)
    assert [each.shape for each in empty] == [(0, n), (0, n)]


def test_weights_written_by_the_kernel_in_front_are_read() -> None:
    """The launch is dependent, the reads stand behind the wait."""
    n = 4096
    x, residual = rows(4, n, 17), rows(4, n, 18)
    written = [torch.zeros(n, device="cuda", dtype=BF16) for _ in range(2)]
    bound = bind_norm_add_norm(LLAMA)
    for turn in range(200):
        sources = [torch.full((n,), 1.0 + (turn + other) % 7, device="cuda") for other in (0, 3)]
        want = bound(x, residual, sources[0].to(BF16), EPS, sources[1].to(BF16), NEXT_EPS)
        for weight, source in zip(written, sources, strict=True):
            weight.copy_(source)
        found = bound(x, residual, written[0], EPS, written[1], NEXT_EPS)
        assert all(same(a, b) for a, b in zip(found, want, strict=True)), turn


@pytest.mark.parametrize("n", [128, 1003, 3584, 4608, 5376, 20000])
def test_triton_bits_are_those_of_its_separate_kernels(n: int) -> None:
    for spec in (LLAMA, GEMMA, FP32_SUM):
        for m in (1, 37):
            check(rows(m, n, 19), rows(m, n, 20), *weights(n, BF16, spec), spec, "triton")


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "glm4", "olmo2", "exaone4"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_families_are_proved(small_model: Callable[..., PreTrainedModel], model_type: str, dtype: torch.dtype) -> None:
    model = small_model(model_type, dtype).cuda()
    tokens = torch.arange(1, 40, device="cuda")[None]
    before = model(tokens, use_cache=False).logits
    rmsnorm_patch.apply(model)
    proof = rmsnorm_patch.verify(model, tokens)
    assert proof.passed, proof.explain()
    assert proof.fired.pairs_fused == proof.fired.pairs_expected
    rmsnorm_patch.revert(model)
    assert torch.equal(model(tokens, use_cache=False).logits, before)


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_every_call_is_the_launchers_and_gives_the_bits_of_python(
    small_model: Callable[..., PreTrainedModel], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first call of each kind no check of a sandwich is made in Python; rows of another dtype were before."""
    from rmsnorm_patch.rewrite import norm_adds

    tokens = torch.arange(1, 40, device="cuda")[None]
    with torch.no_grad():
        rmsnorm_patch.apply(before := small_model(model_type, FP32, num_hidden_layers=4).cuda())
        before(tokens, use_cache=False)
    model = small_model(model_type, BF16, num_hidden_layers=4).cuda()
    rmsnorm_patch.apply(model)
    with torch.no_grad():
        guarded = model(tokens, use_cache=False).logits
        model(tokens, use_cache=False)

        def never(*operands: object) -> None:
            shown = [(o.shape, o.stride(), o.data_ptr() % 256) if isinstance(o, torch.Tensor) else o for o in operands]
            raise AssertionError(f"the C functions were to decide: {shown}")

        for name in ("_norm_add", "_norm_add_norm", "_norm_add_tail"):
            monkeypatch.setattr(norm_adds, name, never)
        assert torch.equal(model(tokens, use_cache=False).logits, guarded)
        events: list[observe.Event] = []
        with observe.observing(events.append):
            model(tokens, use_cache=False)
    assert {event.backend for event in events if event.kind == "norm_add"} == {"cuda"}
