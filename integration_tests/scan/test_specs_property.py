"""For any NormSpec, a module that computes it is read back as an equivalent spec."""

import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.spec import OUTPUT_DTYPES, ROUNDINGS, SUPPORTED_DTYPES, WEIGHT_OFFSETS, NormSpec
from rmsnorm_patch.scan.norms import infer_spec
from rmsnorm_patch.scan.probe import probe_cases, same_bits


class Computes(nn.Module):
    """`reference.rms_norm` by a spec whose fields lie in attributes, as a remote-code norm would keep them."""

    def __init__(self, spec, columns):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(columns)) if spec.has_weight else None
        self.epsilon = spec.eps
        self.part = spec.width
        self.bundle = spec.group
        self.rest = (spec.round_before_weight, spec.weight_offset, spec.has_weight, spec.output)

    def forward(self, states):
        rounding, offset, has_weight, output = self.rest
        spec = NormSpec(self.epsilon, rounding, offset, has_weight, output, "rounded", self.part, self.bundle)
        return reference.rms_norm(states, self.gain, spec)


ROUNDING_AXES = {
    "eps": st.one_of(st.none(), st.sampled_from([0.0, 1e-6, 1e-5]), st.floats(0.0, 1.0)),
    "round_before_weight": st.sampled_from(ROUNDINGS),
    "weight_offset": st.sampled_from(WEIGHT_OFFSETS),
    "output": st.sampled_from(OUTPUT_DTYPES),
}


@st.composite
def specs(draw):
    columns = draw(st.sampled_from([2, 3, 8, 40, 64, 129, 768]))
    shape = draw(st.sampled_from(["whole", "width", "group"]))
    divisors = [d for d in range(1, columns) if columns % d == 0]
    axes = {name: draw(axis) for name, axis in ROUNDING_AXES.items()}
    spec = NormSpec(
        **axes,
        has_weight=draw(st.booleans()),
        width=draw(st.integers(1, columns - 1)) if shape == "width" else None,
        group=draw(st.sampled_from(divisors)) if shape == "group" else None,
    )
    return spec, columns


def bits_agree(a, b, columns):
    """Both specs, on fresh random inputs of every dtype pair."""
    generator = torch.Generator().manual_seed(5)
    for case in probe_cases(columns):
        x = torch.randn(16, columns, generator=generator).to(case.x.dtype)
        weight = torch.randn(columns, generator=generator).to(case.weight.dtype)
        left = reference.rms_norm(x, weight if a.has_weight else None, a)
        if not same_bits(left, reference.rms_norm(x, weight if b.has_weight else None, b)):
            return False
    return True


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(specs())
def test_the_spec_of_a_module_is_read_back(drawn):
    spec, columns = drawn
    match = infer_spec(Computes(spec, columns))
    assert match.spec is not None, match.reason
    assert match.spec.eps == spec.eps
    assert match.eps_attribute == "epsilon"
    assert match.weight_attribute == ("gain" if spec.has_weight else None)
    assert bits_agree(match.spec, spec, columns), (match.spec, spec)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.builds(NormSpec, **ROUNDING_AXES), st.sampled_from([40, 64, 129, 768]))
def test_a_weighted_spec_of_ordinary_width_is_read_back_exactly(spec, columns):
    assert infer_spec(Computes(spec, columns)).spec == spec


def test_the_dtype_pairs_are_all_there():
    pairs = {(case.x.dtype, case.weight.dtype) for case in probe_cases(64)}
    assert pairs == {(a, b) for a in SUPPORTED_DTYPES for b in SUPPORTED_DTYPES}
