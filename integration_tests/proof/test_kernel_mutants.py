"""Each wrong kernel turns a proof red, at every site or at one only, and the site is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from proof_models import apply_as_kernel, as_kernel, build, finish, honest, prompts

from rmsnorm_patch import VerificationFailed, verify
from rmsnorm_patch.numerics.spec import NormSpec
from rmsnorm_patch.proof.probes import FAMILIES

SHORT = (("llama", torch.float32), ("gemma2", torch.float16))
"""What the short form has beside bf16."""
Norm = Callable[[torch.Tensor, torch.Tensor, NormSpec, float], torch.Tensor]


def with_mean(mean: Callable[[torch.Tensor], torch.Tensor]) -> Norm:
    def norm(x, weight, spec, eps):  # type: ignore[no-untyped-def]
        h = x.float()
        return finish(h * torch.rsqrt(mean(h) + eps), x.dtype, weight, spec)

    return norm


def wrong_rounding(x, weight, spec, eps):  # type: ignore[no-untyped-def]
    axis = "none" if spec.round_before_weight == "input" else "input"
    return honest(x, weight, replace(spec, round_before_weight=axis), eps).to(x.dtype)


def neighbour(x, weight, spec, eps):  # type: ignore[no-untyped-def]
    """The last row scaled by the first row's rstd: a kernel that reads past a block of rows."""
    right = honest(x, weight, spec, eps)
    rows = right.reshape(-1, right.shape[-1]).clone()
    scale = x.reshape(rows.shape).float().pow(2).mean(-1).rsqrt()
    rows[-1] *= (scale[0] / scale[-1]).to(rows.dtype)
    return rows.reshape(right.shape)


def unwritten(x, weight, spec, eps):  # type: ignore[no-untyped-def]
    right = honest(x, weight, spec, eps).clone()
    right[..., -1] = float("nan")
    return right


NORMS: dict[str, Norm] = {
    "eps_1e-5": lambda x, w, s, e: honest(x, w, s, 1e-5),
    "eps_0": lambda x, w, s, e: honest(x, w, s, 0.0),
    "divisor_n_minus_1": with_mean(lambda h: h.pow(2).sum(-1, keepdim=True) / (h.shape[-1] - 1)),
    "divisor_n_plus_1": with_mean(lambda h: h.pow(2).sum(-1, keepdim=True) / (h.shape[-1] + 1)),
    "last_8_columns_missed": with_mean(lambda h: h[..., :-8].pow(2).sum(-1, keepdim=True) / h.shape[-1]),
    "last_column_missed": with_mean(lambda h: h[..., :-1].pow(2).sum(-1, keepdim=True) / h.shape[-1]),
    "bf16_accumulation": with_mean(lambda h: h.bfloat16().pow(2).mean(-1, keepdim=True).float()),
    "mean_not_squared": with_mean(lambda h: h.abs().mean(-1, keepdim=True).pow(2)),
    "no_weight": lambda x, w, s, e: honest(
        x, torch.zeros_like(w) if s.weight_offset != "none" else torch.ones_like(w), s, e
    ),
    "offset_flipped": lambda x, w, s, e: honest(
        x, w, replace(s, weight_offset="fp32" if s.weight_offset == "none" else "none"), e
    ).to(x.dtype),
    "norm_skipped": lambda x, w, s, e: x.clone(),
    "neighbours_rstd": neighbour,
    "last_column_unwritten": unwritten,
}
PAIRS = {
    "outputs_swapped": lambda n, a, b: (a + b, n(a + b)),
    "residual_not_added": lambda n, a, b: (n(a), a + b),
    "residual_not_written": lambda n, a, b: (n(a + b), b),
    "hidden_states_returned": lambda n, a, b: (n(a + b), a),
    "operand_doubled": lambda n, a, b: (n(a + a), a + a),
    "sum_off_by_one_ulp": lambda n, a, b: (n(a + b), (a + b) * (1 + torch.finfo(a.dtype).eps)),
    "norm_of_difference": lambda n, a, b: (n(a - b), a + b),
    "sum_stored_in_half": lambda n, a, b: (n(a + b), (a + b).half().to(a.dtype)),
}


def pair_kernel(pair: Callable) -> Callable:
    def run(op, spec, x, residual, weight, eps):  # type: ignore[no-untyped-def]
        def norm(value: torch.Tensor) -> torch.Tensor:
            return honest(value, weight, spec, eps)

        return norm(x) if residual is None else pair(norm, x, residual)

    return run


def red(model: torch.nn.Module, greedy_tokens: int = 0) -> VerificationFailed:
    """Without greedy text, which a test asks for where it says something of it."""
    with pytest.raises(VerificationFailed) as caught:
        verify(model, prompts(), greedy_tokens=greedy_tokens)
    return caught.value


HONEST = [
    pytest.param(
        kind,
        dtype,
        marks=() if dtype == torch.bfloat16 or (kind, dtype) in SHORT else pytest.mark.long,
        id=f"{kind}-{dtype}",
    )
    for kind in ("llama", "qwen3", "gemma2", "mixtral")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("kind", "dtype"), HONEST)
def test_an_honest_kernel_is_green(kind: str, dtype: torch.dtype, kernel: Callable) -> None:
    kernel(as_kernel(honest))
    model = build(kind, dtype)
    apply_as_kernel(model)
    proof = verify(model, prompts())
    assert proof.passed
    assert all(set(site.backends) == {"triton"} for site in proof.sites)
    names = {m.name for site in proof.sites for m in site.measurements}
    assert names >= {
        "captured",
        "decode",
        *(f"{form}:{f}" for form in ("norm", "pair") for f in FAMILIES),
        "driven:tiny",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(NORMS))
def test_wrong_norm_everywhere(name: str, dtype: torch.dtype, kernel: Callable) -> None:
    kernel(as_kernel(NORMS[name]))
    model = build("gemma2" if name == "offset_flipped" else "llama", dtype)
    apply_as_kernel(model)
    proof = red(model).proof
    assert not any(site.passed for site in proof.sites)


def test_wrong_rounding_axis(kernel: Callable) -> None:
    """In fp32 the axis does not exist."""
    kernel(as_kernel(wrong_rounding))
    for kind in ("llama", "gemma2"):
        model = build(kind, torch.bfloat16)
        apply_as_kernel(model)
        assert not any(site.passed for site in red(model).proof.sites)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_wrong_pair_everywhere(name: str, kernel: Callable) -> None:
    kernel(pair_kernel(PAIRS[name]))
    model = build("llama", torch.bfloat16 if name != "sum_stored_in_half" else torch.float32)
    apply_as_kernel(model)
    proof = red(model).proof
    paired = [site for site in proof.sites if site.path != "model.layers.0.input_layernorm"]
    assert len(paired) == 6
    assert not any(site.passed for site in paired)


PATHS = ("model.layers.1.post_attention_layernorm", "model.layers.2.input_layernorm", "model.norm")
BAD_LAYERS = [
    pytest.param(name, path, marks=() if path == PATHS[number % 3] else pytest.mark.long)
    for number, name in enumerate(sorted(NORMS))
    for path in PATHS
]
"""The short form: every fault at one path, every path with four faults or more."""


@pytest.mark.parametrize(("name", "path"), BAD_LAYERS)
def test_one_bad_layer_is_found_and_named(name: str, path: str, kernel: Callable) -> None:
    model = build("gemma2" if name == "offset_flipped" else "llama", torch.bfloat16)
    if name == "offset_flipped" and path == "model.layers.2.input_layernorm":
        path = "model.layers.2.pre_feedforward_layernorm"
    bad = model.get_submodule(path).weight

    def norm(x, weight, spec, eps):  # type: ignore[no-untyped-def]
        return (NORMS[name] if weight is bad else honest)(x, weight, spec, eps)

    kernel(as_kernel(norm))
    apply_as_kernel(model)
    caught = red(model)
    assert [site.path for site in caught.proof.sites if not site.passed] == [path]
    assert caught.site == path
    assert f"--site {path}" in str(caught)


def test_wrong_eps_in_qwen3_is_red_although_every_best_token_agrees(kernel: Callable) -> None:
    kernel(as_kernel(NORMS["eps_1e-5"]))
    model = build("qwen3", torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)  # rms 1, as the hidden states of a trained model
    apply_as_kernel(model)
    proof = red(model, greedy_tokens=16).proof
    assert proof.logits.top1_agreement == 1.0
    assert proof.greedy.equal
    assert proof.logits.passed
    assert not any(site.passed for site in proof.sites)
