"""Norms that nobody listed are matched by what they compute; look-alikes are rejected, each with its reason."""

import importlib.util
import sys
import textwrap

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec
from rmsnorm_patch.scan.norms import infer_spec, variant_name

WIDTH = 48


@pytest.fixture
def remote(tmp_path):
    """Import source as transformers imports remote code: a module of its own, unknown to the package."""
    loaded = []

    def load(source):
        path = tmp_path / f"modeling_remote_{len(loaded)}.py"
        path.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(f"remote_{tmp_path.name}_{len(loaded)}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]


def test_odd_names_and_a_helper_method_are_matched(remote):
    code = remote(
        """
        import torch
        class Zephyr(torch.nn.Module):
            def __init__(self, width, jitter=3e-5):
                super().__init__()
                self.gain = torch.nn.Parameter(torch.zeros(width))
                self.register_parameter("bias", None)
                self.jitter = jitter
                self.momentum = 0.25
                self.layer_index = 7
            def _energy(self, h):
                return (h * h).mean(dim=-1, keepdim=True)
            def forward(self, states):
                h = states.float()
                h = h * (self._energy(h) + self.jitter).rsqrt()
                return ((1 + self.gain.float()) * h).to(states.dtype)
        """
    )
    match = infer_spec(code.Zephyr(WIDTH))
    assert match.spec == NormSpec(3e-5, "none", "fp32", True, "input")
    assert (match.eps_attribute, match.weight_attribute, match.hidden_size) == ("jitter", "gain", WIDTH)
    assert "gemma" in match.reason


class ConstantEps(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.scale, 2.5e-6)


class ClassEps(nn.Module):
    tiny = 4e-6

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.w * F.rms_norm(x, (x.shape[-1],), None, self.tiny)


class UnusedExtras(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-6

    def forward(self, x, residual=None, **kwargs):
        return F.rms_norm(x, (x.shape[-1],), self.w, self.eps)


class ConfigEps(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.eps = config["eps"]
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        scale = 2.0 if self.config["double"] else 1.0
        return F.rms_norm(x, (x.shape[-1],), self.w, self.eps) * scale


class LeadingColumns(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = 16
        self.eps = 1e-6
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h[..., : self.part].pow(2).mean(-1, keepdim=True) + self.eps)
        return self.w * h.to(x.dtype)


class NoMixedDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        if x.dtype != self.weight.dtype:
            raise TypeError("mixed dtypes")
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def test_eps_as_a_constant_in_the_code():
    match = infer_spec(ConstantEps())
    assert (match.spec.eps, match.eps_attribute, match.weight_attribute) == (2.5e-6, None, "scale")
    assert match.spec.variant == FP32_WEIGHT_MULTIPLY.variant


def test_eps_as_a_class_attribute_is_read_anew():
    module = ClassEps()
    assert infer_spec(module).spec == NormSpec(4e-6)
    module.tiny = 5e-6
    assert (infer_spec(module).spec.eps, infer_spec(module).eps_attribute) == (5e-6, "tiny")


def test_optional_arguments_that_are_never_read_do_no_harm():
    assert infer_spec(UnusedExtras()).spec.variant == FP32_WEIGHT_MULTIPLY.variant


def test_attributes_that_are_no_plain_data_decide_per_module():
    assert infer_spec(ConfigEps({"eps": 1e-6, "double": False})).spec is not None
    assert infer_spec(ConfigEps({"eps": 1e-6, "double": True})).spec is None


def test_variance_over_leading_columns():
    assert infer_spec(LeadingColumns()).spec == NormSpec(width=16)


def test_a_norm_that_refuses_mixed_dtypes_is_judged_by_the_others():
    match = infer_spec(NoMixedDtypes())
    assert match.spec.variant == FP32_WEIGHT_MULTIPLY.variant
    assert "3 dtype pairs" in match.reason


@pytest.mark.parametrize("eps", [None, 0.0, 0, 1e-5, 1e-12])
def test_eps_is_kept_exactly(eps):
    match = infer_spec(nn.RMSNorm(WIDTH, eps=eps))
    assert match.spec.eps is eps if eps is None else (match.spec.eps == eps and match.eps_attribute == "eps")


@pytest.mark.parametrize(("affine", "has_weight"), [(True, True), (False, False)])
def test_flags_of_one_class_are_told_apart(affine, has_weight):
    match = infer_spec(nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=affine))
    assert match.spec.has_weight is has_weight
    assert match.weight_attribute == ("weight" if has_weight else None)


def test_common_variants_have_their_names():
    named = {LLAMA: "llama", GEMMA: "gemma", T5: "t5", FP32_WEIGHT_MULTIPLY: "fp32-weight-multiply"}
    assert {spec: variant_name(spec) for spec in named} == named
    assert variant_name(NormSpec(width=3, eps=1e-5)) == "llama width=3"
