"""Kernels beside each other, without a GPU: what it lets be timed, its suites, how the compiling is shared out."""

from __future__ import annotations

import weakref

import pytest
import torch

from rmsnorm_patch.bench import cases, providers, runs, warm
from rmsnorm_patch.bench.rows import PEERS
from rmsnorm_patch.bench.suites import SUITES
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import LLAMA

FUSED, PLAIN, PAIR = "fused_add_rms_norm", "rms_norm", "rms_norm_pair"


def provider(op, call, in_place=False):
    return providers.Provider("under test", op, call, in_place)


def right(op, spec):
    """The reference arithmetic with the call of a provider of `op`."""
    if op == FUSED:
        return lambda x, residual, weight, eps: reference.fused_add_rms_norm(x, residual, weight, spec, eps)
    norm = lambda x, weight, eps: reference.rms_norm(x, weight, spec, eps)  # noqa: E731
    if op == PAIR:
        return lambda q, k, q_weight, k_weight, eps: (norm(q, q_weight, eps), norm(k, k_weight, eps))
    return norm


@pytest.mark.parametrize("op", [FUSED, PLAIN, PAIR])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("variant", ["", "llama", "fp32 weight", "fp32 weight and result", "1+w", "weightless"])
def test_a_right_kernel_is_let_through(op, dtype, variant):
    case = cases.Case(op, "hot", dtype, 5, 256, variant)
    assert cases.check(provider(op, right(op, case.spec)), case) == ""


def test_the_fp32_sum_is_held_against_the_unrounded_sum():
    case = cases.Case(FUSED, "hot", torch.bfloat16, 16, 512, "fp32 sum")
    assert cases.check(provider(FUSED, right(FUSED, case.spec)), case) == ""


def test_in_place_results_are_read_from_the_operands():
    case = cases.Case(FUSED, "hot", torch.bfloat16, 5, 256)

    def call(x, residual, weight, eps):
        normed, total = reference.fused_add_rms_norm(x, residual, weight, case.spec, eps)
        x.copy_(normed), residual.copy_(total)

    assert cases.check(provider(FUSED, call, in_place=True), case) == ""
    assert "sum differs" in cases.check(provider(FUSED, lambda *_: None, in_place=True), case)


def _first(x):
    return torch.arange(x.shape[-1], device=x.device) < 250


@pytest.mark.parametrize(
    ("what", "call", "said"),
    [
        ("scale", lambda x, w, eps: reference.rms_norm(x, w, LLAMA, eps) * 1.05, "relative error"),
        (
            "last columns",
            lambda x, w, eps: reference.rms_norm(x, w, LLAMA, eps) * (torch.arange(256) < 250),
            "relative",
        ),
        ("NaN", lambda x, w, eps: reference.rms_norm(x, w, LLAMA, eps) * float("nan"), "relative error nan"),
        ("dtype", lambda x, w, eps: reference.rms_norm(x, w, LLAMA, eps).float(), "torch.float32"),
        ("shape", lambda x, w, eps: reference.rms_norm(x, w, LLAMA, eps)[:3], "returned (3, 256)"),
        ("count", lambda x, w, eps: (x, x), "returned 2 tensors"),
    ],
)
def test_a_wrong_kernel_is_not_timed(what, call, said):
    case = cases.Case(PLAIN, "hot", torch.bfloat16, 5, 256)
    assert said in cases.check(provider(PLAIN, call), case)


def test_a_second_norm_of_a_pair_is_checked_too():
    case = cases.Case(PAIR, "hot", torch.bfloat16, 3, 128)
    norm = reference.rms_norm
    swapped = lambda q, k, qw, kw, eps: (norm(q, qw, LLAMA, eps), norm(k, qw, LLAMA, eps))  # noqa: E731
    assert "relative error" in cases.check(provider(PAIR, swapped), case)


def test_a_pair_is_views_of_one_projection():
    case = cases.Case(PAIR, "cold", torch.bfloat16, 7, 128)
    ((q, k),) = cases.operands(case, 1)
    assert (q.shape, k.shape) == ((7, 32, 128), (7, 8, 128))
    assert q.stride(0) == k.stride(0) == 48 * 128
    assert k.data_ptr() - q.data_ptr() == 32 * 128 * 2
    assert case.bytes == 2 * 7 * 40 * 128 * 2


def test_bytes_follow_the_dtypes():
    count = 4096 * 4096
    assert cases.Case(FUSED, "cold", torch.bfloat16, 4096, 4096).bytes == 8 * count
    assert cases.Case(FUSED, "cold", torch.bfloat16, 4096, 4096, "fp32 weight and result").bytes == 10 * count
    assert cases.Case(PLAIN, "cold", torch.float32, 4096, 4096).bytes == 8 * count


@pytest.mark.parametrize(("mode", "held"), [("hot", 1), ("cold", 4)])
def test_results_of_a_hot_run_are_dropped_and_of_a_cold_one_kept(monkeypatch, mode, held):
    """A hot run whose results stayed alive would write to fresh memory at every call, as long as it allocates."""
    monkeypatch.setattr(cases, "_sets", lambda case: 4 if case.mode == "cold" else 1)
    made = []

    def step(inputs):
        made.append(weakref.ref(result := inputs[0] * 2))
        return result

    launches, count = cases._launches(cases.Case(PLAIN, mode, torch.float32, 2, 8), step)
    kept = launches()
    assert len(made) == count
    assert sum(reference() is not None for reference in made) == len(kept) == held


def test_a_chain_passes_its_results_on():
    double = lambda inputs: tuple(2 * x for x in inputs)  # noqa: E731
    case = cases.Case(FUSED, "chain", torch.float64, 2, 8)
    launches, count = cases._launches(case, double)
    for x, start in zip(launches(), cases.operands(case, 1)[0], strict=True):
        assert torch.equal(x, start * 2.0**count)


def test_suites_hold_what_the_aims_need():
    shapes = lambda name: {(t.case.op, t.case.mode, t.case.m, t.case.n) for t in SUITES[name]}  # noqa: E731
    assert {(FUSED, "cold", 4096, n) for n in (1024, 16384, 20480, 24576, 32768)} <= shapes("prefill")
    assert {(FUSED, "chain", m, n) for m in (1, 16, 64, 128, 256) for n in (2048, 2880, 16384)} <= shapes("decode")
    assert {(op, "cold", 512, n) for op in (FUSED, PLAIN) for n in (65536, 131072, 262144)} <= shapes("long")
    assert {(PAIR, "hot", 1, 128), (PAIR, "hot", 16, 128), (PAIR, "cold", 4096, 128)} <= shapes("qk")
    keys = [t.case for name in SUITES for t in SUITES[name]]
    assert len(keys) == len(set(keys)), "two suites hold one case: the second would replace the first's row"


@pytest.mark.parametrize("jobs", [1, 5, 14])
def test_every_case_is_compiled_by_one_process(jobs):
    todo = [item for suite in SUITES.values() for item in suite]
    portions = [warm.portion(todo, index, jobs) for index in range(jobs)]
    shape = lambda item: (item.case.op, item.case.dtype, item.case.m, item.case.n, item.case.variant)  # noqa: E731
    assert {shape(item) for part in portions for item in part} == {shape(item) for item in todo}
    for item in (item for part in portions for item in part):
        rows = (item.case.op, item.case.dtype, item.case.n, item.case.variant)
        holders = [part for part in portions if rows in {(*shape(i)[:2], *shape(i)[3:]) for i in part}]
        assert len(holders) == 1


@pytest.mark.parametrize("op", [FUSED, PLAIN, PAIR])
def test_a_provider_that_is_not_here_is_named_with_the_reason(op):
    found, missing = providers.load(op, cases.Case(op, "hot", torch.bfloat16, 1, 64).spec)
    names = {provider.name for provider in found}
    assert {"ours_triton", "eager", "F.rms_norm", "inductor"} <= names
    assert names.isdisjoint(missing)
    assert names | missing.keys() >= set(PEERS)
    assert all(missing.values())


def test_a_provider_from_outside(tmp_path, monkeypatch):
    (tmp_path / "somebody.py").write_text("def norm(x, weight, eps):\n    return x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    case = cases.Case(PLAIN, "hot", torch.bfloat16, 4, 64)
    found, _ = providers.load(PLAIN, case.spec, extra=["somebody:norm", "named=somebody:norm"], wanted=["eager"])
    assert [provider.name for provider in found] == ["eager", "somebody:norm", "named"]
    assert [cases.check(provider, case)[:14] for provider in found] == ["", "relative error", "relative error"]


def test_suites_or_shapes_are_chosen():
    hot = [item.case for item in runs.chosen(["hot"], runs.Shapes())]
    assert hot == [item.case for item in SUITES["hot"]]
    made = runs.chosen([], runs.Shapes(op=PLAIN, mode="chain", dtype="fp16", m=(1, 2), n=(64,)), ["ours"])
    assert [item.case for item in made] == [cases.Case(PLAIN, "chain", torch.float16, m, 64) for m in (1, 2)]
    assert {item.only for item in made} == {("ours",)}
    assert [item.case.n for item in runs.chosen([], runs.Shapes())] == list(runs.GLANCE_N)


@pytest.mark.parametrize(
    ("suites", "shapes", "said"),
    [
        (["warm"], {}, "suite 'warm': not one of prefill, "),
        ([], {"op": "layer_norm"}, "op 'layer_norm': not one of fused_add_rms_norm, rms_norm, rms_norm_pair"),
        ([], {"mode": "warm"}, "mode 'warm'"),
        ([], {"dtype": "fp8"}, "dtype 'fp8': not one of bf16, fp16, fp32"),
        ([], {"variant": "gemma"}, "variant 'gemma': not one of one rounding"),
        ([], {"op": PAIR, "mode": "chain"}, "its results are not its operands"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_are(suites, shapes, said):
    with pytest.raises(ValueError, match=said):
        runs.chosen(suites, runs.Shapes(**shapes))


def test_a_summary_is_of_rows_with_a_peer():
    shape = {"op": PLAIN, "mode": "cold", "dtype": "bf16", "m": 4096, "n": 4096}
    rows = [{**shape, "us": {"ours": 2.0, "quack": 3.0}}, {**shape, "us": {"ours": 2.0, "quack": 2.0}}]
    alone = {**shape, "mode": "hot", "us": {"ours": 1.0}}
    assert runs.summary([*rows, alone]) == [
        "rms_norm cold bf16: best peer / ours, geometric mean 1.225, worst 1.000, n=2"
    ]
