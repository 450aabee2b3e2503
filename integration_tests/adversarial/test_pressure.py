"""What single cases do not press: random models of all families, many cycles of apply and revert, many steps.

A short seeded run each, and the long one under the marker `long`. A failure prints the seed that made it.
"""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import rmsnorm_patch
from rmsnorm_patch.errors import UnsupportedModel
from rmsnorm_patch.patch_state import STATE, derives_from_patched

FAMILIES = ("gemma2", "glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen3", "qwen3_moe", "smollm3")
"""Those of the short run: quick to build, and of different layouts."""
BYTES_A_ROUND, BYTES_AT_MOST = 16, 64 * 1024
"""Growth of Python's memory: what a round may leave, and what may come once. An unpatched model's runs move it by up to
thirty thousand bytes, since freed objects wait for reuse. Objects that the collector knows are counted exactly."""


@pytest.fixture(scope="module")
def configs(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("small_configs")


def _drawn(configs: ModuleType, model_type: str, draw: random.Random) -> PreTrainedModel:
    """A model of a random configuration and dtype; raises whatever transformers does for one that it cannot build."""
    fields = configs.small_config(model_type).to_dict()
    fields.pop("model_type")
    heads = draw.choice((1, 2, 4))
    wanted: dict[str, Any] = {
        "hidden_size": draw.choice((32, 48, 64, 80)) * 2,
        "intermediate_size": draw.choice((40, 96, 130)),
        "num_attention_heads": 4,
        "num_key_value_heads": heads,
        "rms_norm_eps": draw.choice((1e-6, 1e-5, 0.1)),
        "tie_word_embeddings": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
    }
    fields.update({name: value for name, value in wanted.items() if name in fields and draw.random() < 0.6})
    torch.manual_seed(draw.randrange(2**31))
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    config = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 30_000_000:
        raise ValueError(f"{size} parameters")
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.uniform_(-1.5, 1.5)
    return model


@torch.no_grad()
def _outputs(model: PreTrainedModel, tokens: torch.Tensor, **arguments: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    result = model(tokens, output_hidden_states=True, **arguments)
    states = getattr(result, "hidden_states", None) or ()
    return [result.logits, *(state for state in states if isinstance(state, torch.Tensor))]


def _same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Bit for bit; NaN equals NaN, since random weights in half precision overflow."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


def _some_norms(model: PreTrainedModel, draw: random.Random) -> dict[str, list[str]]:
    """Options of apply: all norms, or a random half of them included or excluded."""
    paths = [site.path for site in rmsnorm_patch.plan(model).fused_norms()]
    kind = draw.choice(("all", "all", "include", "exclude"))
    some = draw.sample(paths, len(paths) // 2)
    return {kind: some} if some and kind != "all" else {}


def _press(configs: ModuleType, model_type: str, seed: int, snapshot: Callable[..., list]) -> bool:
    """Patch and unpatch one random model; whether there was one. AssertionError names type, seed and what differed."""
    draw = random.Random(f"{model_type} {seed}")
    tokens = torch.tensor([[draw.randrange(3, 120) for _ in range(draw.randrange(1, 14))] * draw.choice((1, 2))])
    try:
        model = _drawn(configs, model_type, draw)
        before = _outputs(model, tokens)
    except Exception:  # whatever the library raises for a configuration that is not its own
        return False
    named = f"{model_type}, seed {seed}"
    try:
        options = _some_norms(model, draw)
        plan = rmsnorm_patch.plan(model, backend="reference", **options)
        untouched = snapshot(model)
        report = rmsnorm_patch.apply(model, backend="reference", **options)
    except UnsupportedModel:  # no RMSNorm, or none that is known
        return False
    assert report.plan == plan, named
    rmsnorm_patch.revert(model)
    assert snapshot(model) == untouched, named
    assert not any(derives_from_patched(type(m)) or STATE in m.__dict__ for m in model.modules()), named
    rmsnorm_patch.apply(model, backend="reference", **options)
    assert _same(_outputs(model, tokens), before), named
    rmsnorm_patch.revert(model)
    assert not any(derives_from_patched(type(m)) or STATE in m.__dict__ for m in model.modules()), named
    assert _same(_outputs(model, tokens), before), named
    return True


@pytest.mark.parametrize("model_type", FAMILIES)
def test_random_models_keep_their_bits(configs, snapshot, model_type):
    assert any([_press(configs, model_type, seed, snapshot) for seed in range(2)])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_random_models_of_all_families_keep_their_bits(configs, snapshot):
    pressed = {
        model_type
        for seed in range(10, 16)
        for model_type in configs.MODEL_TYPES
        if _press(configs, model_type, seed, snapshot)
    }
    assert len(pressed) > 100


@pytest.fixture
def memory(collect_garbage: Callable[[], None]) -> Iterator[Callable[[], tuple[int, int]]]:
    """`memory()`: objects that the collector knows, bytes that Python holds."""

    def held() -> tuple[int, int]:
        collect_garbage()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    yield held
    tracemalloc.stop()


ROUNDS = pytest.mark.parametrize(
    "rounds", [20, pytest.param(500, marks=[pytest.mark.long, pytest.mark.slow])], ids=["short", "long"]
)
STEPS = pytest.mark.parametrize(
    "steps", [40, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.slow])], ids=["short", "long"]
)


def _is_flat(work: Callable[[], None], rounds: int, memory: Callable[[], tuple[int, int]]) -> None:
    for _ in range(max(5, rounds // 2)):  # growth that comes to an end: classes, caches, freed objects kept for reuse
        work()
    objects, size = memory()
    for _ in range(rounds):
        work()
    objects_after, size_after = memory()
    assert objects_after - objects < rounds / 4
    assert size_after - size < BYTES_A_ROUND * rounds + BYTES_AT_MOST


@ROUNDS
def test_cycles_of_apply_and_revert_leave_nothing(small_model, ids, memory, rounds):
    model = small_model("llama")

    def cycle() -> None:
        rmsnorm_patch.apply(model)
        with torch.no_grad():
            model(ids)
        rmsnorm_patch.revert(model)

    _is_flat(cycle, rounds, memory)


@ROUNDS
def test_models_that_were_patched_are_let_go(small_model, ids, memory, rounds):
    def cycle() -> None:
        rmsnorm_patch.apply(small_model("llama", num_hidden_layers=1))

    _is_flat(cycle, rounds, memory)


@STEPS
def test_steps_of_a_patched_model_leave_nothing(small_model, ids, memory, steps):
    model = small_model("qwen3")
    rmsnorm_patch.apply(model)

    def step() -> None:
        with torch.no_grad():
            model(ids)
        model.generate(ids, max_new_tokens=2, do_sample=False)

    _is_flat(step, steps, memory)
