"""`compiled="joined"` on a GPU: captured graphs whose norms add up the parts of the product in front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn as nn
from torch._inductor import config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.fused.linear_norm import captured
from rmsnorm_patch.fused.linear_norm import splits as linear_norm_splits
from rmsnorm_patch.fused.linear_norm.kernel import MOST_ROWS
from rmsnorm_patch.numerics import tolerances
from rmsnorm_patch.numerics.spec import LLAMA
from rmsnorm_patch.proof.difference import compare

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("products_unknown")]
BF16 = torch.bfloat16
N, K = 4096, 14336
measured = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="products are split on sm_90"
)


@pytest.fixture(autouse=True)
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[captured.Outcome]]:
    monkeypatch.delenv("RMSNORM_PATCH_COMPILE", raising=False)
    told: list[captured.Outcome] = []
    captured.on_settled.append(told.append)
    torch._dynamo.reset()
    # Inductor would time ways to add up a row, and two compilations of one graph could then choose differently.
    with config.patch({"force_disable_caches": True, "triton.autotune_pointwise": False}):
        yield told
    torch._dynamo.reset()
    captured.on_settled.remove(told.append)


class Layer(nn.Module):
    """What Inductor computes itself here is exact, so that the bits are eager's."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(K, N, bias=False), LlamaRMSNorm(N)

    def forward(self, rows: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual * 2 + self.down(rows)
        return self.norm(total), total


def layer() -> Layer:
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = Layer().to(BF16).eval()
        nn.init.normal_(made.norm.weight)
    return made


def given(m: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(m, 1, n, generator=generator, device="cuda").to(BF16) for n in (K, N)]


def kernels_of(call: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def replayed(model: nn.Module, mode: str | None = "reduce-overhead") -> Callable[..., tuple[torch.Tensor, ...]]:
    compute = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)

    def run(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(result.clone() for result in compute(*operands))

    return run


@measured
@pytest.mark.parametrize("m", [1, 8, 32])
@torch.no_grad()
def test_replays_have_the_bits_of_eager_mode(m: int, outcomes: list[captured.Outcome]) -> None:
    """A product and the fused norm behind it, and no kernel of the library's that adds up parts."""
    model = layer()
    fused = ops.bind_fused_add_rms_norm_(LLAMA)

    def eager(rows: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, total = torch.mm(rows.view(m, K), model.down.weight.t()), (residual * 2).view(m, N)
        fused(x, total, model.norm.weight, model.norm.variance_epsilon)
        return x.view(m, 1, N), total.view(m, 1, N)

    rmsnorm_patch.apply(model, compiled="joined")
    run = replayed(model)
    for seed in range(5):  # compiled, captured, replayed
        want, got = eager(*given(m, seed)), run(*given(m, seed))
        assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True)), seed
    assert [outcome.joined for outcome in outcomes] == [1]
    finder = linear_norm_splits.finder_of("")
    assert [split.kind for split in finder.known.values()] == ["parts"]
    names = kernels_of(lambda: run(*given(m)))
    assert sum("rms_norm_partials" in name for name in names) == 1
    assert not any("splitKreduce" in name for name in names)


@pytest.mark.parametrize(
    ("mode", "m", "why"),
    [(None, 8, "the graph is not captured"), ("reduce-overhead", 300, f"more than {MOST_ROWS} rows")],
    ids=["None-8", "reduce-overhead-300"],
)
@torch.no_grad()
def test_code_of_stock_where_nothing_is_joined(
    mode: str | None, m: int, why: str, compiled_code: ModuleType, outcomes: list[captured.Outcome]
) -> None:
    """The bits of a norm are not asked: those of two compilations of stock may differ. The sum's are."""
    model = layer()

    def compiled() -> tuple[list[tuple[torch.Tensor, ...]], str]:
        run = replayed(model, mode)
        found: tuple[list[tuple[torch.Tensor, ...]], str] = compiled_code.compiled_anew(
            lambda: [run(*given(m, seed)) for seed in range(3)]  # compiled, captured, replayed
        )
        return found

    want, stock = compiled()
    rmsnorm_patch.apply(model, compiled="joined")
    got, code = compiled()
    assert outcomes == [captured.Outcome(0, Counter({why: 1}))]
    assert code == stock
    for (normed, total), (stock_normed, stock_total) in zip(got, want, strict=True):
        assert compare(normed, stock_normed).violations(tolerances.SITE[BF16], BF16) == ()
        assert compare(total, stock_total).violations(tolerances.EXACT, BF16) == ()


def small(model_type: str) -> PreTrainedModel:
    """Two layers whose output and down projections are split for few rows."""
    settings = {
        "vocab_size": 512, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=BF16).eval()


@torch.no_grad()
def decoded(model: PreTrainedModel, step: Callable[..., object], batch: int, tokens: int = 6) -> torch.Tensor:
    """Logits [tokens, batch, vocabulary] after a prompt, each step given the same tokens."""
    ids = torch.arange(batch * 24, device="cuda").view(batch, 24) * 7 % 512
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :16], past_key_values=cache, use_cache=True)
    logits = []
    for place in range(16, 16 + tokens):
        torch.compiler.cudagraph_mark_step_begin()
        out = step(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1].float().clone())  # type: ignore[attr-defined]
    return torch.stack(logits)


@measured
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_captured_decode_of_a_model(model_type: str, batch: int, outcomes: list[captured.Outcome]) -> None:
    """As near to fp32 as the unpatched model compiled is, and all four norms behind products take them over."""
    model = small(model_type)
    rmsnorm_patch.apply(model, compiled="joined")
    compute = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    got = decoded(model, compute, batch)
    assert [outcome.joined for outcome in outcomes] == [4]
    names = kernels_of(lambda: decoded(model, compute, batch))
    assert sum("rms_norm_partials" in name for name in names) >= 4
    rmsnorm_patch.revert(model)
    torch._dynamo.reset()
    stock = decoded(model, torch.compile(model.forward, mode="reduce-overhead", dynamic=False), batch)
    model.float()
    exact = decoded(model, model, batch)
    errors = [((logits - exact).norm() / exact.norm()).item() for logits in (got, stock)]
    assert errors[0] <= 1.5 * errors[1], errors


@measured
@torch.no_grad()
def test_generate_with_a_static_cache(outcomes: list[captured.Outcome]) -> None:
    """transformers compiles the decoding step itself then."""
    model = small("llama")
    rmsnorm_patch.apply(model, compiled="joined")
    ids = torch.arange(16, device="cuda")[None] * 7 % 512
    answer = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert answer.shape == (1, 24)
    assert 4 in [outcome.joined for outcome in outcomes]
