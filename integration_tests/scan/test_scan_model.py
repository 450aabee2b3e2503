"""`scan_norms` over whole models: what it lists, what it refuses, and that it leaves no trace."""

import random
import time
from types import MethodType

import accelerate
import numpy
import pytest
import torch
import torch.nn as nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rmsnorm_patch.errors import UnsupportedModel
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, LLAMA
from rmsnorm_patch.rewrite.classes import install_factories, patched_class
from rmsnorm_patch.rewrite.norms import ROLE, key_of
from rmsnorm_patch.scan import norms
from rmsnorm_patch.scan.norms import infer_spec, scan_norms

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, **HEADS}


def llama(layers=2, **changes):
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": layers, "rms_norm_eps": 1e-5, **changes}))


def state_of(model):
    """Everything that a scan must leave alone, tensors by identity, version and bits."""
    modules = [(name, id(m), type(m), sorted(m.__dict__), dict(m.__dict__)) for name, m in model.named_modules()]
    tensors = [(name, id(t), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()]
    return modules, tensors


def assert_unchanged(model, before):
    modules, tensors = state_of(model)
    for now, then in zip(modules, before[0], strict=True):
        assert now[:4] == then[:4]
        assert all(now[4][name] is then[4][name] for name in then[4]), now[0]
    for now, then in zip(tensors, before[1], strict=True):
        assert now[:3] == then[:3]
        assert torch.equal(now[3], then[3])


def test_llama_is_listed_whole():
    sites = scan_norms(llama())
    paths = [f"model.layers.{i}.{n}" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")]
    assert [site.path for site in sites] == [*paths, "model.norm"]
    for site in sites:
        assert (site.class_name, site.spec.variant, site.spec.eps) == ("LlamaRMSNorm", LLAMA.variant, 1e-5)
        assert (site.action, site.hidden_size, site.weight_dtype) == ("fuse", 32, "float32")
        assert (site.eps_attribute, site.weight_attribute) == ("variance_epsilon", "weight")


def test_head_norms_are_probed_at_their_own_width():
    model = Qwen3Model(Qwen3Config(**SMALL, num_hidden_layers=1, head_dim=16))
    widths = {site.path: site.hidden_size for site in scan_norms(model)}
    assert widths["layers.0.self_attn.q_norm"] == widths["layers.0.self_attn.k_norm"] == 16
    assert widths["layers.0.input_layernorm"] == 32


def test_the_model_and_every_random_state_are_untouched():
    model = llama().train()
    model.model.norm.register_forward_hook(lambda *_: pytest.fail("the module was called"))
    before = state_of(model)
    norms._BY_CLASS.clear()
    states = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    scan_norms(model)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[1:]
    assert_unchanged(model, before)
    assert torch.is_grad_enabled()


class DrawsAtRandom(nn.Module):
    """A norm-like module whose forward consumes every generator there is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x):
        return x + torch.rand(()) + random.random() + numpy.random.rand()


def test_a_forward_that_draws_leaves_the_generators_as_they_were():
    states = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert infer_spec(DrawsAtRandom()).spec is None
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_meta_weights_in_any_dtype(dtype):
    with torch.device("meta"):
        model = llama(hidden_size=4096, layers=1).to(dtype)
        sites = scan_norms(model)
    assert {(site.action, site.weight_dtype) for site in sites} == {("fuse", str(dtype).removeprefix("torch."))}


def test_the_scan_works_under_inference_mode_autocast_and_a_half_default_dtype():
    model = llama()
    norms._BY_CLASS.clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            sites = scan_norms(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {site.spec for site in sites} == {LLAMA.__class__(1e-5)}


def test_a_32_layer_model_is_scanned_in_under_a_second():
    """Of this process: other work on the cores is not counted."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, hidden_size=4096, vocab_size=64))
    norms._BY_CLASS.clear()
    start = time.process_time()
    assert len(scan_norms(model)) == 65
    assert time.process_time() - start < 1.0


def test_accelerate_hooks_and_offloaded_weights():
    model = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    norm = model.model.norm
    assert norm.weight.is_meta
    assert "_old_forward" in norm.__dict__
    sites = scan_norms(model)
    assert {site.action for site in sites} == {"fuse"}
    assert all("under accelerate's hooks" in site.reason for site in sites)


class HubRMSNorm(nn.Module):
    """A layer such as the kernel hub ships."""

    def forward(self, hidden_states):
        return hidden_states


def test_an_instance_level_forward_left_by_kernelize_is_reported(monkeypatch):
    layer = pytest.importorskip("kernels.layer.layer")
    norm = LlamaRMSNorm(32)
    layer._replace_forward(norm, HubRMSNorm)
    monkeypatch.setitem(layer._CACHED_LAYER, "RMSNorm of this test", HubRMSNorm)  # as `kernelize` does
    match = infer_spec(norm)
    assert match.spec.variant == LLAMA.variant
    assert "read from under the instance-level" in match.reason
    assert "HubRMSNorm.forward" in match.reason


def test_an_instance_level_forward_of_unknown_origin_is_left_alone():
    norm = LlamaRMSNorm(32)
    norm.forward = MethodType(HubRMSNorm.forward, norm)
    match = infer_spec(norm)
    assert match.spec is None
    assert "HubRMSNorm.forward" in match.reason
    assert "delete it" in match.reason


def test_liger_instances_are_read_by_their_class():
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    norm = LlamaRMSNorm(32)
    monkey_patch._patch_rms_norm_module(norm, eps=1e-6)
    match = infer_spec(norm)
    assert match.spec.variant == LLAMA.variant
    assert match.eps_attribute == "variance_epsilon"
    assert "LigerRMSNorm" in match.reason


def test_a_patched_module_is_read_by_its_original_class():
    install_factories()
    model = llama()
    before = scan_norms(model)
    for site in before:
        module = model.get_submodule(site.path)
        module.__class__ = patched_class(LlamaRMSNorm, ROLE, key_of(site, "reference"))
    assert scan_norms(model) == before


def test_a_class_that_fsdp_derived_is_read_like_its_base():
    from torch.distributed.fsdp import FSDPModule

    norm = LlamaRMSNorm(32)
    norm.__class__ = type("FSDPLlamaRMSNorm", (FSDPModule, LlamaRMSNorm), {})
    assert infer_spec(norm).spec.variant == LLAMA.variant


def test_a_shared_norm_is_one_site_with_all_its_paths():
    model = llama()
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    shared = [site for site in scan_norms(model) if site.shared_paths]
    assert [(s.path, s.shared_paths) for s in shared] == [
        ("model.layers.0.input_layernorm", ("model.layers.1.input_layernorm",))
    ]
    assert len(scan_norms(model)) == 4


def test_a_shared_layer_and_a_cycle_of_modules():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    model.model.layers[0].__dict__["_modules"]["above"] = model.model
    sites = scan_norms(model)
    assert [(site.path, site.shared_paths) for site in sites if "input" in site.path] == [
        ("model.layers.0.input_layernorm", ("model.layers.1.input_layernorm",))
    ]
    assert len(sites) == 3


def test_a_module_that_is_the_model_itself():
    [site] = scan_norms(nn.RMSNorm(16, eps=1e-6))
    assert (site.path, site.class_name, site.action) == ("", "RMSNorm", "fuse")


def test_include_and_exclude_by_path():
    model = llama()
    actions = {s.path: s.action for s in scan_norms(model, ["model.layers.*"], ["*.1.post_attention_layernorm"])}
    assert [path for path, action in actions.items() if action == "fuse"] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
    ]
    left = {s.path: s.reason for s in scan_norms(model, exclude=["model.norm"]) if s.action == "leave"}
    assert left.keys() == {"model.norm"}
    assert left["model.norm"].startswith("excluded by 'model.norm'")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_named(option):
    with pytest.raises(UnsupportedModel, match=r"layers\.9") as raised:
        scan_norms(llama(), **{option: ["model.layers.9.*"]})
    assert raised.value.site == f"{option}='model.layers.9.*'"
    assert "model.norm" in raised.value.supported


def test_a_string_of_patterns_is_refused():
    with pytest.raises(UnsupportedModel, match="the string 'model\\.norm'"):
        scan_norms(llama(), include="model.norm")


@pytest.mark.parametrize("thing", [None, "model", LlamaForCausalLM, {"a": 1}])
def test_what_is_no_module_is_refused(thing):
    with pytest.raises(UnsupportedModel, match=r"torch\.nn\.Module"):
        scan_norms(thing)


def test_a_model_without_rms_norm_is_refused_with_what_it_holds():
    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
    with pytest.raises(UnsupportedModel, match=r"3 x LayerNorm: it has a bias"):
        scan_norms(model)
    with pytest.raises(UnsupportedModel, match="no norm module at all"):
        scan_norms(nn.Linear(4, 4))


class Scaled(nn.Module):
    """Built like a norm, and called otherwise: listed once its structure matches."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(16))
        self.small = 1e-6

    def forward(self, x):
        h = x.float()
        return (self.g * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.small))).type_as(x)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x * self.gamma


def test_only_what_looks_like_a_norm_is_listed():
    sites = scan_norms(nn.Sequential(Scaled(), LayerScale(), nn.Linear(16, 16), nn.LayerNorm(16), nn.SiLU()))
    assert [(site.path, site.class_name, site.action) for site in sites] == [
        ("0", "Scaled", "fuse"),
        ("3", "LayerNorm", "leave"),
    ]


def test_one_class_with_many_widths_and_eps_is_not_mixed_up():
    modules = nn.ModuleList(LlamaRMSNorm(n, eps) for n in (8, 16) for eps in (1e-6, 1e-5, 0.0))
    found = [(site.hidden_size, site.spec.eps) for site in scan_norms(modules)]
    assert found == [(n, eps) for n in (8, 16) for eps in (1e-6, 1e-5, 0.0)]


def test_gemma3n_has_weighted_and_weightless_norms():
    config = Gemma3nTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=64, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, layer_types=["sliding_attention"] * 3 + ["full_attention"],
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    with torch.device("meta"):
        sites = {site.path: site for site in scan_norms(Gemma3nForCausalLM(config))}
    v_norm = next(site for path, site in sites.items() if path.endswith("v_norm"))
    assert (v_norm.spec.has_weight, v_norm.weight_attribute, v_norm.action) == (False, None, "fuse")
    assert sites["model.norm"].spec.variant == FP32_WEIGHT_MULTIPLY.variant
