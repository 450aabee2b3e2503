"""Gated norms of whole models: patched as plain ones are, right, and undone without a trace."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import PreTrainedModel
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

import rmsnorm_patch
from rmsnorm_patch.proof import probes
from rmsnorm_patch.rewrite import guards, observe
from rmsnorm_patch.rewrite.gated import NO_GATE
from rmsnorm_patch.scan.plan import NormSite

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # large probes on purpose

BF16 = torch.bfloat16
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
          "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**LINEAR, **EXPERTS},
    "qwen3_5_text": LINEAR,
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16,
               "num_attention_heads": None, "num_key_value_heads": None, "max_position_embeddings": None},
    "bamba": {**MAMBA, "mamba_n_groups": 2, "mamba_chunk_size": 16, "attn_layer_indices": [1], "head_dim": None},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_chunk_size": 16},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "head_dim": None,
                         "num_experts_per_tok": 2, "mamba_n_groups": 1, "mamba_chunk_size": 16},
}  # fmt: skip
INCLUDED = {"qwen3_5_text": "*.linear_attn.norm", "mamba2": "*.mixer.norm"}
GATINGS = {"qwen3_next": "times silu(gate)", "qwen3_5_text": "times silu(gate)", "falcon_h1": "times silu(gate)"}
GROUPS = {"group_size": 16} if "group_size" in inspect.signature(BambaRMSNormGated).parameters else {}
"""Older releases of transformers norm its rows whole."""
TOKENS = torch.arange(3, 12).repeat(2, 1) * 7 % 128


@pytest.fixture
def model_of(small_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    return lambda model_type, dtype=BF16: small_model(model_type, dtype, **MODELS[model_type])


def gated_sites(plan: rmsnorm_patch.Plan) -> list[NormSite]:
    return [site for site in plan.norms if "Gated" in site.class_name]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits  # type: ignore[no-any-return]


def described(model: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    return {path: (type(module), dict(module.__dict__)) for path, module in model.named_modules()}


ASKED = [
    pytest.param(
        model_type, dtype, marks=() if dtype == BF16 or model_type in ("qwen3_next", "mamba2") else pytest.mark.long
    )
    for model_type in MODELS
    for dtype in (BF16, torch.float16, torch.float32)
]
"""The short form: every model in bf16, and one model of each order of norm and gate in the other dtypes."""


@pytest.mark.parametrize(("model_type", "dtype"), ASKED, ids=str)
def test_a_model_keeps_its_bits_is_proved_and_comes_back(model_of: Any, model_type: str, dtype: torch.dtype) -> None:
    model = model_of(model_type, dtype)
    before, own = described(model), logits(model)
    report = rmsnorm_patch.apply(model, backend="reference")
    sites = gated_sites(report.plan)
    assert sites
    for site in sites:
        assert site.action == "fuse"
        assert str(site.gating) == GATINGS.get(model_type, "of x times silu(gate)")
        assert site.path in report.norms
    assert torch.equal(logits(model), own)
    calls = {site.path: site for site in rmsnorm_patch.status(model).sites}
    assert all(calls[site.path].counts()["reference"] == calls[site.path].calls == 1 for site in sites)
    proof = rmsnorm_patch.verify(model, TOKENS)
    judged = {site.path: site for site in proof.sites}
    assert all(judged[site.path].calls["norm"] for site in sites)
    rmsnorm_patch.revert(model)
    assert described(model) == before
    assert torch.equal(logits(model), own)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(probes, "_ELEMENTS", 1 << 12)  # the interpreter is a thousand times slower than a GPU


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "mamba2"])
def test_a_kernel_serves_and_the_proof_sees_it(model_of: Any, model_type: str) -> None:
    model = model_of(model_type)
    report = rmsnorm_patch.apply(model, backend="triton", include=[INCLUDED[model_type]])
    proof = rmsnorm_patch.verify(model, TOKENS)
    logits(model)
    calls = {site.path: site for site in rmsnorm_patch.status(model).sites}
    judged = {site.path: site for site in proof.sites}
    for site in gated_sites(report.plan):
        assert calls[site.path].counts()["alone"] == calls[site.path].calls == 1
        assert judged[site.path].backends["triton"]
        assert {"captured", "norm:randn", "norm:large"} <= {each.name for each in judged[site.path].measurements}


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_kernel_is_seen(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that enters by another activation."""
    from rmsnorm_patch.fused.gated_norm import portable

    model, included = model_of("qwen3_5_text"), [INCLUDED["qwen3_5_text"]]
    rmsnorm_patch.apply(model, backend="triton", include=included)
    constants = portable.constants
    monkeypatch.setattr(portable, "constants", lambda *args: constants(*args) | {"ACTIVATION": "sigmoid"})
    proof = rmsnorm_patch.verify(model, TOKENS, raise_on_failure=False)
    assert not proof.passed
    wrong = {site.path for site in proof.sites if any(each.violations for each in site.measurements)}
    assert wrong == {site.path for site in rmsnorm_patch.plan(model, include=included, backend="triton").fused_norms()}


def patched(norm: nn.Module, backend: str = "reference") -> nn.Module:
    """The norm in a model of its own, patched."""
    model = nn.Sequential(norm).eval()
    rmsnorm_patch.apply(model, backend=backend)
    return norm


def test_arguments_are_the_original_s() -> None:
    x, gate = torch.randn(3, 64), torch.randn(3, 64)
    qwen, bamba = Qwen3NextRMSNormGated(64), BambaRMSNormGated(64, **GROUPS)
    own = [qwen(x, gate), bamba(x, gate), bamba(x)]
    for norm in (qwen, bamba):
        patched(norm)
        for ours in (
            norm(x, gate),
            norm(x, gate=gate),
            norm(hidden_states=x, gate=gate),
            norm(gate=gate, hidden_states=x),
        ):
            assert torch.equal(ours, own[norm is bamba])
    for ours in (bamba(x), bamba(x, None), bamba(x, gate=None)):
        assert torch.equal(ours, own[2])
    assert rmsnorm_patch.status(nn.Sequential(bamba)).sites[0].why == {NO_GATE: 3}
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'gate'"):
        qwen(x)
    with pytest.raises(TypeError):
        qwen(x, gate, 1)
    with pytest.raises(AttributeError):  # as the original does
        qwen(x, None)


@pytest.mark.usefixtures("interpreted")
def test_what_no_kernel_takes_falls_back_and_says_why() -> None:
    norm = patched(BambaRMSNormGated(64, **GROUPS).to(BF16), "triton")
    own: Any = BambaRMSNormGated.forward
    x, gate = torch.randn(3, 64, dtype=BF16), torch.randn(3, 64, dtype=BF16)
    status = lambda: rmsnorm_patch.status(nn.Sequential(norm)).sites[0]  # noqa: E731
    with torch.no_grad():
        norm(x, gate)
        norm(x, gate.float())
        assert (status().alone, status().fallen_back) == (2, 0)
        assert torch.equal(norm(x, gate[:1]), own(norm, x, gate[:1]))
        assert torch.equal(norm(x, gate.double()), own(norm, x, gate.double()))
        norm.train()
        norm(x, gate)
        norm.eval()
    asking = gate.clone().requires_grad_()
    for parameter in norm.parameters():
        parameter.requires_grad_(False)
    norm(x, asking).sum().backward()
    assert asking.grad is not None
    reasons = status().why
    assert reasons[guards.TRAINING] == reasons["a gradient is wanted"] == 1
    shown = [reason for reason in reasons if reason.startswith("gate is a Tensor")]
    assert len(shown) == 2
    assert any("(1, 64)" in reason for reason in shown)
    assert any("torch.float64" in reason for reason in shown)


def test_copies_and_pickles_are_patched_and_reverted_for_themselves(model_of: Any) -> None:
    model = model_of("bamba")
    own = logits(model)
    rmsnorm_patch.apply(model, backend="reference")
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(made), own)
        assert rmsnorm_patch.status(made).counts()["reference"]
        rmsnorm_patch.revert(made)
        assert rmsnorm_patch.plan(made).norms
        assert {type(m) for m in made.modules() if "Gated" in type(m).__name__} == {BambaRMSNormGated}
    held = next(m for m in model.modules() if isinstance(m, BambaRMSNormGated))
    forward = held.forward
    rmsnorm_patch.revert(model)
    x = torch.randn(2, 128, dtype=BF16)
    assert torch.equal(forward(x, x), BambaRMSNormGated.forward(held, x, x))  # held beyond the revert


def test_an_event_carries_the_gate() -> None:
    norm, seen = patched(Qwen3NextRMSNormGated(64)), []
    x, gate = torch.randn(3, 64), torch.randn(3, 64)
    with observe.observing(seen.append):
        norm(x, gate)
    assert [(event.kind, event.backend) for event in seen] == [("norm", "reference")]
    assert seen[0].operands[0] is x
    assert seen[0].gate is gate


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kept", ["", "op"])
def test_in_a_graph(monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    """The original arithmetic; the op, where graphs are asked to keep ops and a backend is forced."""
    if kept:
        monkeypatch.setenv("RMSNORM_PATCH_COMPILE", kept)
    norm = patched(Qwen3NextRMSNormGated(64), "triton")
    nodes: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, gate = torch.randn(3, 64), torch.randn(3, 64)
    with torch.no_grad():
        own = Qwen3NextRMSNormGated.forward(norm, x, gate)
        compiled = torch.compile(lambda a, b: norm(a, b), backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x, gate), own)
    assert any("rms_norm_gated" in name for name in nodes) is bool(kept)
