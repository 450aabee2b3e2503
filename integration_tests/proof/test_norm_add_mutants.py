"""Each wrong kernel of an add behind a norm turns a proof red, and the site is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from proof_models import apply_as_kernel, as_kernel, build, honest, prompts

from rmsnorm_patch import VerificationFailed, verify
from rmsnorm_patch.fused.norm_add.op import BoundNormAdd

Added = Callable[..., torch.Tensor]


def exact(norm, x, residual):  # type: ignore[no-untyped-def]
    return norm(x) + residual


SUMS: dict[str, Added] = {
    "norm_not_rounded": lambda norm, x, residual: (norm(x.float()) + residual.float()).to(x.dtype),
    "norm_skipped": lambda norm, x, residual: x + residual,
    "residual_not_added": lambda norm, x, residual: norm(x),
    "operands_swapped": lambda norm, x, residual: norm(residual) + x,
    "sum_normed_too": lambda norm, x, residual: norm(x + residual),
    "one_ulp": lambda norm, x, residual: exact(norm, x, residual) * (1 + torch.finfo(x.dtype).eps),
    "last_column": lambda norm, x, residual: torch.cat([exact(norm, x, residual)[..., :-1], residual[..., -1:]], -1),
}


@pytest.fixture
def added(kernel: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """added(f, g): sums are f(norm, x, residual), the norm of a sum is g(norm, sum), wherever `at` says of a weight."""

    def install(
        total: Added, reader: Callable = lambda norm, sums: norm(sums), at: Callable = lambda weight: True
    ) -> None:
        kernel(as_kernel(honest))

        def route(self, x, weight):  # type: ignore[no-untyped-def]
            def call(x, residual, weight, eps, *following):  # type: ignore[no-untyped-def]
                def normed(of, scale, added):  # type: ignore[no-untyped-def]
                    return lambda value: honest(value, of.to(value.dtype), self.spec, added)

                wrong = at(weight)
                sums = (total if wrong else exact)(normed(weight, weight, eps), x, residual)
                if not following:
                    return sums
                other, other_eps = following
                by = normed(other, other, other_eps)
                return (reader(by, sums) if wrong else by(sums)), sums

            return "triton", call

        monkeypatch.setattr(BoundNormAdd, "_route", route)

    return install


def red(model: torch.nn.Module) -> VerificationFailed:
    with pytest.raises(VerificationFailed) as caught:
        verify(model, prompts(), greedy_tokens=0)
    return caught.value


def test_an_honest_kernel_is_green(added: Callable) -> None:
    added(exact)
    model = build("gemma2", torch.bfloat16)
    apply_as_kernel(model)
    proof = verify(model, prompts())
    assert proof.passed
    forms = {m.name for site in proof.sites for m in site.measurements}
    assert {"norm_add:randn", "norm_add:tiny", "norm_add:last", "norm_add:large"} <= forms


@pytest.mark.parametrize("name", SUMS)
def test_a_wrong_sum(name: str, added: Callable) -> None:
    added(SUMS[name])
    model = build("gemma2", torch.bfloat16)
    apply_as_kernel(model)
    caught = red(model)
    behind = [site for site in caught.proof.sites if ".post_" in site.path]
    assert len(behind) == 6
    assert not any(site.passed for site in behind)


def test_a_wrong_norm_of_the_sum(added: Callable) -> None:
    added(exact, lambda norm, sums: norm(sums) * 1.01)
    model = build("gemma2", torch.bfloat16)
    apply_as_kernel(model)
    wrong = {site.path for site in red(model).proof.sites if not site.passed}
    assert {"model.norm", "model.layers.1.input_layernorm", "model.layers.1.pre_feedforward_layernorm"} <= wrong


def test_one_bad_layer_is_found_and_named(added: Callable) -> None:
    model = build("gemma2", torch.bfloat16)
    path = "model.layers.1.post_attention_layernorm"
    bad = model.get_submodule(path).weight
    added(SUMS["norm_not_rounded"], at=lambda weight: weight is bad)
    apply_as_kernel(model)
    caught = red(model)
    assert path in [site.path for site in caught.proof.sites if not site.passed]
    assert not {site.path for site in caught.proof.sites if not site.passed} - {
        path, "model.layers.1.pre_feedforward_layernorm"
    }  # fmt: skip


def test_a_call_that_nobody_reports_is_missed(added: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm_patch.rewrite import norm_adds

    added(exact)
    model = build("gemma2", torch.bfloat16)
    apply_as_kernel(model)

    def silent(inner, side, a, b, total, backend):  # type: ignore[no-untyped-def]
        return a, b

    monkeypatch.setattr(norm_adds, "_report", silent)
    assert not red(model).proof.fired.passed
