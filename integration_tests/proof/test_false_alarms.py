"""What must stay green, or be judged otherwise: routing ties, near-ties of tokens, specs that differ by design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from proof_models import apply_as_kernel, as_kernel, build, finish, honest, prompts
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rmsnorm_patch import VerificationFailed, apply, plan, rewrite, verify
from rmsnorm_patch.numerics.tolerances import LOGIT_ERROR_RATIO
from rmsnorm_patch.proof import logits, prove
from rmsnorm_patch.proof.difference import bits
from rmsnorm_patch.proof.runs import Run
from rmsnorm_patch.proof.sites import SiteWatcher
from rmsnorm_patch.proof.wide import wide_outputs
from rmsnorm_patch.rewrite import observe
from rmsnorm_patch.scan.norms import scan_norms


def noisy(x, weight, spec, eps):  # type: ignore[no-untyped-def]
    """0.03% of the elements off by one ulp, within the tolerance."""
    right = honest(x, weight, spec, eps)
    draw = torch.rand(right.shape, generator=torch.Generator().manual_seed(right.numel()))
    step = torch.where(draw < 1.5e-4, -1, torch.where(draw < 3e-4, 1, 0)).to(torch.int16)
    return (bits(right) + torch.where(right == 0, 0, step)).view(right.dtype)


def test_a_routing_tie_is_no_failure(kernel: Callable) -> None:
    """One token goes to another expert: its logits, and by attention those after it, are far off in one of the runs."""
    kernel(as_kernel(noisy))
    model, inputs = build("mixtral", torch.float16, seed=3), prompts(4, 64, seed=13)
    run = Run("forward", inputs)
    with torch.no_grad():
        wide, original = wide_outputs(model, [run])[0], run(model)[0]
    apply_as_kernel(model)
    patched = run(model)[0]

    def rms(actual: torch.Tensor) -> float:
        return logits.errors([logits.rows(actual, inputs)], [logits.rows(wide, inputs)]).typical(experts=False)

    assert rms(patched) > 4 * LOGIT_ERROR_RATIO * rms(original)
    proof = verify(model, inputs, greedy_tokens=0)
    assert proof.logits.experts
    assert proof.logits.ratio < 1.1


@pytest.mark.parametrize("path", ["model.layers.1.post_attention_layernorm", "model.norm"])
def test_a_wrong_kernel_before_a_router_is_red(path: str, kernel: Callable) -> None:
    model = build("mixtral", torch.float16, seed=3)
    bad = model.get_submodule(path).weight
    kernel(as_kernel(lambda x, w, s, e: honest(x, w, s, 1e-6 if w is bad else e)))  # the model has 1e-5
    apply_as_kernel(model)
    with pytest.raises(VerificationFailed) as caught:
        verify(model, prompts(4, 64, seed=13))
    assert caught.value.site == path


def generation(margin: float, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    steps = torch.zeros(1, len(tokens), 8)
    steps[..., 2], steps[..., 5] = 1.0 + margin, 1.0
    return torch.tensor([[7, 7, *tokens]]), steps


@pytest.mark.parametrize(
    ("margin", "strict", "passed"), [(0.019, False, True), (0.021, False, False), (0.019, True, False)]
)
def test_a_token_may_turn_only_where_the_originals_own_error_decides(margin: float, strict: bool, passed: bool) -> None:
    original, patched = generation(margin, [2, 2, 2]), generation(margin, [2, 5, 5])
    found = logits.judge_greedy(original, patched, own_max_abs=0.01, strict=strict)
    assert not found.equal
    assert found.first_difference == "token 1 of sequence 0"
    assert found.margin == pytest.approx(margin, rel=1e-4)
    assert found.passed is passed


def test_the_widest_parting_of_a_batch_counts() -> None:
    near, far = generation(0.001, [2, 2]), generation(0.5, [2, 2])
    original = (torch.cat([near[0], far[0]]), torch.cat([near[1], far[1]]))
    patched = (torch.tensor([[7, 7, 5, 5], [7, 7, 2, 5]]), original[1])
    found = logits.judge_greedy(original, patched, own_max_abs=0.01, strict=False)
    assert found.first_difference == "token 1 of sequence 1"
    assert not found.passed


def test_fewer_tokens_are_red() -> None:
    assert not logits.judge_greedy(generation(1.0, [2, 2]), generation(1.0, [2]), 10.0, strict=False).passed


def unrounded(op, spec, x, residual, weight, eps):  # type: ignore[no-untyped-def]
    """The norm reads the fp32 sum, as Inductor's fusion does."""
    if residual is None:
        return honest(x, weight, spec, eps)
    h = x.float() + residual.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return finish(h, x.dtype, weight, spec), x + residual


def with_fp32_sum(model: torch.nn.Module) -> None:
    found = plan(model)
    norms = tuple(replace(site, spec=replace(site.spec, sum="fp32")) for site in found.norms)
    rewrite.apply_plan(model, replace(found, backend="triton", norms=norms))


def test_a_spec_that_differs_by_design_is_held_against_fp64(kernel: Callable) -> None:
    kernel(unrounded)
    model = build("llama", torch.bfloat16)
    with_fp32_sum(model)
    proof = verify(model, prompts())
    site = next(site for site in proof.sites if site.path == "model.norm")
    (captured,) = [m for m in site.measurements if m.name == "captured:fp32 sum"]
    assert captured.differing > 0.05 * captured.elements
    assert captured.fused_error < captured.original_error
    unspoken = build("llama", torch.bfloat16)
    apply_as_kernel(unspoken)
    assert not verify(unspoken, prompts(), raise_on_failure=False).passed


@pytest.mark.parametrize("wrong", ["eps", "weight", "sum"])
def test_a_wrong_kernel_of_such_a_spec_is_red(wrong: str, kernel: Callable) -> None:
    def run(op, spec, x, residual, weight, eps):  # type: ignore[no-untyped-def]
        eps = 1e-4 if wrong == "eps" else eps
        result = unrounded(op, spec, x, residual, weight * 1.01 if wrong == "weight" else weight, eps)
        return result if residual is None or wrong != "sum" else (result[0], residual)

    kernel(run)
    model = build("llama", torch.bfloat16)
    with_fp32_sum(model)
    proof = verify(model, prompts(), raise_on_failure=False)
    paired = [site for site in proof.sites if site.path != "model.layers.0.input_layernorm"]
    assert len(paired) == 6
    assert not any(site.passed for site in paired)


def test_logits_that_match_bit_for_bit_need_no_ratio() -> None:
    model = build("llama", torch.float32).double()
    assert prove.dtype_of(model) == torch.float64
    model = build("mixtral", torch.bfloat16)
    apply(model)
    assert verify(model, prompts()).logits.bit_identical


@pytest.mark.parametrize(("eps", "green"), [(1e-6, True), (1e-5, False)])
def test_a_result_widened_by_an_fp32_weight_is_judged_where_it_was_rounded(eps: float, green: bool) -> None:
    """x * rstd is rounded to fp16 and multiplied by an fp32 weight: a flip is thousands of units of the fp32 result."""
    norm = LlamaRMSNorm(512, 1e-6)
    norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    site = next(site for site in scan_norms(torch.nn.ModuleDict({"norm": norm})) if site.path == "norm")
    assert site.spec is not None
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    normed = honest(x, norm.weight, site.spec, eps)
    assert normed.dtype == torch.float32
    watcher = SiteWatcher({"norm": site}, "triton", seed=0)
    watcher.watch(torch.nn.ModuleDict({"norm": norm}))
    with torch.no_grad():
        assert not torch.equal(normed, norm(x))
        watcher(observe.Event("norm", norm, (x,), normed, None, "triton"))
    captured = next(m for m in watcher.proofs()[0].measurements if m.name == "captured")
    assert (captured.violations == ()) is green


def test_a_model_in_double_precision_is_proved_and_its_plan_says_that_kernels_have_no_part() -> None:
    model = build("llama", torch.float32).double()
    sites = [site for site in plan(model).norms if site.action == "fuse"]
    assert sites
    assert {site.falls_back for site in sites} == {"its weight is float64, and no kernel takes that"}
    assert apply(model, verify=prompts(), greedy_tokens=0).proof.passed


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_another_default_device_is_not_where_a_proof_makes_its_tensors(kind: str) -> None:
    """A program may have called `torch.set_default_device`; what is made without a device would then be there."""
    model, inputs = build(kind, torch.bfloat16), prompts()
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        apply(model, backend="reference")
        assert verify(model, inputs, greedy_tokens=0, reference="original").passed
    finally:
        torch.set_default_device(before)


def test_a_seed_of_numpy_is_a_seed() -> None:
    numpy = pytest.importorskip("numpy")
    model = build("llama", torch.float32)
    apply(model, backend="reference")
    assert verify(model, prompts(), seed=numpy.int32(7), greedy_tokens=numpy.int64(1)).passed
