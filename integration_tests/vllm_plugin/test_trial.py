"""A kernel that does not build, or that computes something else, is declined with one warning."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rmsnorm_patch import ops
from rmsnorm_patch.errors import KernelBuildError
from rmsnorm_patch.fused.norm_add import op as norm_add_op
from rmsnorm_patch.fused.norm_quantised import op as norm_quantised_op
from rmsnorm_patch.fused.silu_quantised import op as silu_op
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.contract import PLAIN_OPS
from rmsnorm_patch.numerics.quantisation import QuantSpec, rms_norm_quantised
from rmsnorm_patch.numerics.silu import silu_and_mul_quantised
from rmsnorm_patch.numerics.spec import NormSpec
from rmsnorm_patch.vllm_plugin import calls, log, trial
from rmsnorm_patch.vllm_plugin.decision import SPECS

SPEC = SPECS["rmsnorm_patch"]
CPU = torch.device("cpu")


def _trial(op: str, n: int = 96) -> str:
    return trial._trial(torch.bfloat16, n, torch.bfloat16, SPEC, op, CPU)


@pytest.mark.parametrize("op", PLAIN_OPS)
@pytest.mark.parametrize("provider", sorted(SPECS))
def test_what_computes_the_reference_passes(op: str, provider: str) -> None:
    assert trial._trial(torch.bfloat16, 96, torch.bfloat16, SPECS[provider], op, CPU) == ""
    assert trial._trial(torch.float16, 96, None, SPECS[provider], op, CPU) == ""


def test_a_toolchain_that_cannot_build_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(op: str, spec: object) -> object:
        raise KernelBuildError("rms_norm_rows.cu", "no NVRTC", "NVRTC 12.8 or newer", "install nvidia-cuda-nvrtc")

    monkeypatch.setattr(ops, "bind", broken)
    assert "does not run here (rms_norm_rows.cu: got no NVRTC" in _trial("rms_norm")


@pytest.mark.parametrize("op", PLAIN_OPS)
def test_a_kernel_with_wrong_results_is_a_reason(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """eps 1e-5 for 1e-6 moves a row of the trial by less than bf16 shows; a wrong rstd does not."""
    real = ops.bind

    def wrong(op: str, spec: object) -> object:
        return lambda *given: real(op, SPEC)(*given[:-1], given[-1] + 0.1)

    monkeypatch.setattr(ops, "bind", wrong)
    assert "disagrees with the reference" in _trial(op)


@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_tried_is_what_is_called(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "IN_PLACE", in_place)
    called: list[str] = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Listening():
        x, residual, weight = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((2, 64), (2, 64), 64))
        calls.rms_norm("rmsnorm_patch", x, weight, 1e-6, None)
        calls.fused_add_rms_norm_in_place("rmsnorm_patch", x, residual, weight, 1e-6, None)
    ours = [name.removeprefix("rmsnorm_patch::") for name in called if name.startswith("rmsnorm_patch::")]
    assert tuple(ours) == calls.called_ops()


def test_declined_calls_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    trial._declined.cache_clear()
    log.warn_once.cache_clear()
    x = torch.randn(2, 48).bfloat16()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, logger=log.logger.name):
        for _ in range(3):
            assert "weight of torch.float32" in trial.declined(x, torch.ones(48), SPEC, "rms_norm")
            assert "dtype torch.float64" in trial.declined(x.double(), None, SPEC, "rms_norm")
            assert trial.declined(x, torch.ones(48).bfloat16(), SPEC, "rms_norm") == ""
    assert len(caplog.records) == 2


QUANTS = [
    QuantSpec("fp8_static", "fp32", "native"),
    QuantSpec("fp8_token", "fp32", "native"),
    QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True),
    QuantSpec("int8_token", "rounded", "separate"),
]


@pytest.mark.parametrize("following", [False, True])
def test_a_norm_and_its_adds_are_held_against_the_separate_ops(
    following: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = norm_add_op.NORM_ADD_NORM if following else norm_add_op.NORM_ADD

    def tried() -> str:
        return trial._trial_norm_add(op, torch.bfloat16, 96, torch.bfloat16, SPEC, following, CPU)

    assert tried() == ""
    name = "norm_add_norm" if following else "norm_add"
    real = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda x, residual, *rest: real(x, residual + 1, *rest))
    assert "disagrees with the separate ones" in tried()


def _trial_quantised(op: str, quant: QuantSpec) -> str:
    bounded = quant.scheme == "fp8_static"
    return trial._trial_quantised(op, torch.bfloat16, 256, torch.bfloat16, SPEC, quant, bounded, CPU)


@pytest.mark.parametrize("op", [norm_quantised_op.PLAIN, norm_quantised_op.FUSED])
@pytest.mark.parametrize("quant", QUANTS, ids=lambda quant: quant.scheme)
def test_quantised_rows_are_held_against_the_definition(
    op: str, quant: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is a third too large in what it writes is refused; one that does not build is, too."""
    assert _trial_quantised(op, quant) == ""

    def larger(x: torch.Tensor, *given: object) -> object:
        *results, total = rms_norm_quantised(x, *given)  # type: ignore[arg-type]
        rows = results[0].float() * 1.3
        return rows.to(results[0].dtype), *results[1:], total

    monkeypatch.setattr(norm_quantised_op, "rms_norm_quantised", larger)
    assert "disagrees with the reference" in _trial_quantised(op, quant)

    def broken(*given: object) -> object:
        raise KernelBuildError("rms_norm_quantised.cu", "no NVRTC", "NVRTC 12.8 or newer", "install nvidia-cuda-nvrtc")

    monkeypatch.setattr(norm_quantised_op, "rms_norm_quantised", broken)
    assert "does not run here (rms_norm_quantised.cu: got no NVRTC" in _trial_quantised(op, quant)


@pytest.mark.parametrize("quant", QUANTS, ids=lambda quant: quant.scheme)
def test_rows_of_silu_are_held_against_the_definition(quant: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried() -> str:
        return trial._trial_silu(torch.bfloat16, 512, "rounded", quant, quant.scheme == "fp8_static", CPU)

    assert tried() == ""

    def other_half(x: torch.Tensor, *how: object) -> object:
        return silu_and_mul_quantised(x.roll(256, -1), *how)  # type: ignore[arg-type]

    monkeypatch.setattr(silu_op, "silu_and_mul_quantised", other_half)
    assert "disagrees with the reference" in tried()

    def broken(*given: object) -> object:
        raise KernelBuildError("silu_and_mul_quantised.cu", "no NVRTC", "NVRTC 12.8", "install nvidia-cuda-nvrtc")

    monkeypatch.setattr(silu_op, "silu_and_mul_quantised", broken)
    assert "does not run here (silu_and_mul_quantised.cu: got no NVRTC" in tried()


def test_norms_over_groups_write_no_quantised_rows() -> None:
    spec = NormSpec(has_weight=False, group=128)
    why = trial.declined_quantised(torch.empty(0, 256), None, spec, QUANTS[1], adds=False, bounded=False)
    assert why == "the norm is one over groups"
