"""The kernels of gated norms: against the modules of transformers, few rows against many, strided gates, extremes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn as nn
from made_rows import rand, same
from transformers import PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.fused.gated_norm import op
from rmsnorm_patch.numerics.gating import ACTIVATIONS, ORDERS, GateSpec, gated_rms_norm
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, LLAMA, NormSpec
from rmsnorm_patch.numerics.tolerances import GATED
from rmsnorm_patch.proof.difference import compare
from rmsnorm_patch.scan.norms import infer_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
GATINGS = [GateSpec(activation, order) for activation, order in product(ACTIVATIONS, ORDERS)]  # type: ignore[arg-type]
GROUPED = {"group_size": 1024}
CLASSES: dict[str, dict[str, Any]] = {
    "qwen3_next.Qwen3NextRMSNormGated": {},
    "kimi_linear.KimiLinearRMSNormGated": {},
    "lara_mini.LaraMiniRMSNormGated": {},
    "mamba2.MambaRMSNormGated": GROUPED,
    "bamba.BambaRMSNormGated": {"group_size": 8192},
    "falcon_h1.FalconH1RMSNormGated": {"n_groups": 2, "norm_before_gate": False},
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
          "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": LINEAR,
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16,
               "num_attention_heads": None, "num_key_value_heads": None, "max_position_embeddings": None},
}  # fmt: skip


def check(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """dtype: that of x, in which values were rounded."""
    assert got.dtype == want.dtype
    found = compare(got.to(dtype), want.to(dtype))
    assert not found.violations(GATED[dtype], dtype), found


def class_of(name: str) -> Any:
    """Of transformers; releases differ in the classes that they have, and in whether one norms by groups."""
    folder, _, cls = name.partition(".")
    module = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}", reason=f"no {folder} here")
    made = getattr(module, cls)
    if not CLASSES[name].keys() <= inspect.signature(made).parameters.keys():
        pytest.skip(f"{cls} takes no {', '.join(CLASSES[name])} here")
    return made


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (FP16, FP16, FP32), (FP32, BF16, BF16), (BF16, FP32, FP32)])
@pytest.mark.parametrize("name", CLASSES)
def test_the_modules_of_transformers(name: str, dtypes: tuple[torch.dtype, ...], backend: str) -> None:
    """dtypes: of x, the gate and the weight. The gate is a part of a wider projection where rows are wide."""
    made = class_of(name)
    for n in (128, 8192) if not CLASSES[name] else (8192,):
        norm = made(n, **CLASSES[name]).cuda().eval()
        norm.weight = nn.Parameter(torch.rand(n, device="cuda").add(0.5).to(dtypes[2]), requires_grad=False)
        match = infer_norm(norm)
        assert match.gating is not None
        run = op.bind(match.spec, match.gating, backend)  # type: ignore[arg-type, arg-type]
        for m in (1, 7, 64, 600):
            x, gate = rand(m, n, seed=1, dtype=dtypes[0]), rand(m, 2 * n, seed=2).mul(3).to(dtypes[1])[:, n:]
            check(run(x, gate, norm.weight, norm.variance_epsilon), norm(x, gate), dtypes[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spec", [LLAMA, FP32_WEIGHT_MULTIPLY], ids=["llama", "one rounding"])
@pytest.mark.parametrize("n", [64, 128, 1024, 4096, 8192, 16384])
def test_a_gate_that_comes_last_is_torch_s_own(n: int, spec: NormSpec, activation: Any) -> None:
    """Bit for bit: the plain norm's kernel, then torch's activation and product. Trees differ from sm_100 on."""
    if torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("the plain norms have chunks of 32 bytes there")
    spec = replace(spec, output="promote")
    weight, gating = rand(n, seed=3), GateSpec(activation, "norm_first")
    for m in (1, 33, 700):
        x, gate = rand(m, n, seed=1), rand(m, n, seed=2) * 4
        normed = ops.bind_rms_norm(spec, "cuda")(x, weight, EPS)
        want = (normed * ACTIVATIONS[activation](gate.float())).to(BF16)
        assert same(op.bind(spec, gating, "cuda")(x, gate, weight, EPS), want)


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("group", [None, 512])
def test_few_rows_and_many_give_the_same_bits(gating: GateSpec, group: int | None, backend: str) -> None:
    run, weight = op.bind(NormSpec(group=group), gating, backend), rand(8192, seed=3)
    x, gate = rand(1000, 8192, seed=1), rand(1000, 8192, seed=2)
    many = run(x, gate, weight, EPS)
    for rows in (slice(20, 21), slice(500, 530)):
        assert same(run(x[rows], gate[rows], weight, EPS), many[rows])


@pytest.mark.parametrize("group", [None, 1024])
def test_strided_rows_and_gates(group: int | None, backend: str) -> None:
    """Every second row of three dimensions, a gate out of a packed projection, and both from odd addresses."""
    spec, weight = NormSpec(group=group), rand(4096, seed=3)
    x = rand(2, 14, 8192, seed=1)[:, ::2, :4096]
    packed = rand(2, 7, 4096 + 4096 + 256 + 8, seed=2)
    for gate, order in product((packed[..., :4096], packed[..., 264:4360], packed[..., 3:4099]), ORDERS):
        run = op.bind(spec, GateSpec("silu", order), backend)
        got = run(x, gate, weight, EPS)
        assert got.is_contiguous()
        assert same(got, run(x.contiguous(), gate.contiguous(), weight, EPS))
    odd = rand(5 * 4096 + 1, seed=4)[1:].view(5, 4096)
    run = op.bind(spec, GateSpec("silu", "gate_first"), backend)
    assert same(run(odd, odd, weight, EPS), run(odd.clone(), odd.clone(), weight, EPS))


@pytest.mark.parametrize("gating", GATINGS, ids=str)
def test_extremes(gating: GateSpec, backend: str) -> None:
    x, weight = rand(12, 1024, seed=1, dtype=FP32), torch.ones(1024, device="cuda")
    gate = rand(12, 1024, seed=2, dtype=FP32)
    ends = [float("inf"), -float("inf"), float("nan"), -87.0, -88.5, -104.0, 200.0, 0.0, -0.0, 1e-30, -1e-30, 88.0]
    gate[:, 3] = torch.tensor(ends, device="cuda")
    x[5], x[6, 1], x[7, 2] = 0.0, float("inf"), float("nan")
    got = op.bind(LLAMA, gating, backend)(x, gate, weight, EPS)
    want = gated_rms_norm(x, gate, weight, LLAMA, gating, EPS)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-37, equal_nan=True)


def test_rows_of_an_odd_length_are_triton_s() -> None:
    run = op.bind(LLAMA, GateSpec("silu", "norm_first"))
    x, gate, weight = rand(9, 1003, seed=1), rand(9, 1003, seed=2), rand(1003, seed=3)
    assert run.backend_for(x, gate, weight) == "triton"
    check(run(x, gate, weight, EPS), gated_rms_norm(x, gate, weight, LLAMA, run.gating, EPS), BF16)
    assert run(x[:0], gate[:0], weight, EPS).shape == (0, 1003)


@pytest.mark.parametrize("order", ORDERS)
def test_what_the_kernel_in_front_wrote_is_read(order: Any, backend: str) -> None:
    """The launch is dependent: x, gate and weight are read behind the wait."""
    run = op.bind(LLAMA, GateSpec("silu", order), backend)
    sources = [[rand(64, 4096, seed=s, dtype=FP32), rand(64, 4096, seed=s + 1, dtype=FP32),
                rand(4096, seed=s + 2, dtype=FP32)] for s in (1, 11)]  # fmt: skip
    wanted = [run(*(t.to(BF16) for t in source), EPS) for source in sources]
    torch.cuda.synchronize()
    operands = [torch.empty_like(t, dtype=BF16) for t in sources[0]]
    results = []
    for turn in range(200):
        for operand, source in zip(operands, sources[turn % 2], strict=True):
            operand.copy_(source)
        results.append(run(*operands, EPS))
    for turn, result in enumerate(results):
        assert same(result, wanted[turn % 2]), turn


def test_a_graph_is_captured_and_replayed(backend: str) -> None:
    run = op.bind(NormSpec(group=1024), GateSpec("silu", "gate_first"), backend)
    x, gate, weight = rand(4, 8192, seed=1), rand(4, 16384, seed=2)[:, :8192], rand(8192, seed=3)
    run(x, gate, weight, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, gate, weight, EPS)
    x.copy_(rand(4, 8192, seed=5))
    graph.replay()
    assert same(captured, run(x, gate, weight, EPS))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("model_type", MODELS)
def test_models_are_proved(
    small_model: Callable[..., PreTrainedModel], model_type: str, dtype: torch.dtype, backend: str
) -> None:
    model = small_model(model_type, dtype, **MODELS[model_type]).cuda()
    tokens = (torch.arange(3, 40).repeat(2, 1) * 7 % 128).cuda()
    with torch.no_grad():
        own = model(tokens).logits
        rmsnorm_patch.apply(model, backend=backend)
        rmsnorm_patch.warmup(model)
        proof = rmsnorm_patch.verify(model, tokens)
        model(tokens)
        gated = [site for site in rmsnorm_patch.status(model).sites if "Gated" in site.class_name]
        assert gated
        for site in gated:
            assert (site.alone, site.fallen_back) == (site.calls, 0), site.why
        assert proof.passed
        rmsnorm_patch.revert(model)
        assert torch.equal(model(tokens).logits, own)
