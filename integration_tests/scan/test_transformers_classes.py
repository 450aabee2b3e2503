"""Every RMSNorm-like class of transformers: matched to one spec in all dtype pairs, or rejected with a reason."""

import importlib
import inspect
import pkgutil
import re
import types
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn as nn
import transformers
import transformers.models

from rmsnorm_patch.numerics.gating import GateSpec, gated_rms_norm
from rmsnorm_patch.scan.norms import infer_norm, infer_spec, variant_name
from rmsnorm_patch.scan.subject import Rejected, reachable_codes

pytestmark = pytest.mark.slow

WIDTH = 64
PINNED_VERSION = "5.24"
NEEDS_OTHER_PACKAGES = {"higgs_audio_v2_tokenizer"}  # torchaudio

COUNTS = {
    "llama": 145,
    "fp32-weight-multiply": 26,
    "gemma": 14,
    "t5": 10,
    "weightless": 7,
    "round=none offset=weight_dtype output=input": 1,
}

ROUNDED_SILU = "llama times silu(gate)"
FP32_SILU = "round=none offset=none output=promote times silu(gate)"
FP32_SIGMOID = "round=none offset=none output=promote times sigmoid(gate)"
GATE_FIRST = "llama group=16 of x times silu(gate)"
GATED = {
    "bailing_hybrid.BailingHybridRMSNormGated": FP32_SIGMOID,
    "bamba.BambaRMSNormGated": GATE_FIRST,
    "falcon_h1.FalconH1RMSNormGated": FP32_SILU,
    "glm5_next.Glm5NextTextRMSNormGated": FP32_SIGMOID,
    "granitemoehybrid.GraniteMoeHybridRMSNormGated": GATE_FIRST,
    "kimi_linear.KimiLinearRMSNormGated": FP32_SIGMOID,
    "lara_mini.LaraMiniRMSNormGated": FP32_SILU,
    "mamba2.MambaRMSNormGated": GATE_FIRST,
    "nemotron_h.NemotronHRMSNormGated": GATE_FIRST,
    "olmo_hybrid.OlmoHybridRMSNormGated": ROUNDED_SILU,
    "qwen3_5.Qwen3_5RMSNormGated": ROUNDED_SILU,
    "qwen3_5_moe.Qwen3_5MoeRMSNormGated": ROUNDED_SILU,
    "qwen3_next.Qwen3NextRMSNormGated": ROUNDED_SILU,
    "qwen4_exp.Qwen4ExpTextRMSNormGated": ROUNDED_SILU,
    "zamba2.Zamba2RMSNormGated": GATE_FIRST,
}

MEAN = "it subtracts the mean"
FACTOR = "it rounds 1 / rms to the input's dtype"
UNRUNNABLE = "its forward cannot be run on one tensor [2, 4, N] on the CPU (ValueError: "
REJECTED = {
    "axk2.AXK2GatedRMSNorm": "it has sub-modules (norm, mlp)",
    "cohere.CohereLayerNorm": MEAN,
    "cohere2.Cohere2LayerNorm": MEAN,
    "cohere2_moe.Cohere2MoeLayerNorm": MEAN,
    "cohere_compass.CohereCompassLayerNorm": MEAN,
    "deepseek_v4.DeepseekV4UnweightedRMSNorm": FACTOR,
    "dory.DoryL2Norm": "it divides by the square root of the sum of squares, not of their mean",
    "gemma3n.Gemma3nAudioCumulativeGroupNorm": UNRUNNABLE + "Input tensor shape suffix",
    "glm5_next.Glm5NextTextUnweightedRMSNorm": FACTOR,
    "gradium_phonon_tts.GradiumPhononTTSFlowLayerNorm": "it has a bias",
    "gradium_phonon_tts.GradiumPhononTTSTimestepNorm": "it computes an RMSNorm in another order of operations",
    "hy_v4.HYV4UnweightedRMSNorm": "it returns the factor 1 / rms alone",
    "hy_v4_vl.HYV4VLUnweightedRMSNorm": "it returns the factor 1 / rms alone",
    "muse_spark.MuseSparkTextInputScaledRMSNorm": "it multiplies by the weight before the normalisation",
    "pocket_tts.PocketTTSFlowLayerNorm": "it has a bias",
    "pocket_tts.PocketTTSTimestepNorm": "it divides by the standard deviation about the mean",
    "voxtral_realtime.VoxtralRealtimeTextAdaRmsNorm": "it has sub-modules",
    "xlstm.xLSTMMultiHeadLayerNorm": UNRUNNABLE + "not enough values to unpack (expected 4",
}


def modelling_modules():
    for folder in pkgutil.iter_modules(transformers.models.__path__):
        package = f"transformers.models.{folder.name}"
        directory = importlib.import_module("transformers.models").__path__[0] + "/" + folder.name
        for file in pkgutil.iter_modules([directory]):
            if file.name.startswith("modeling_"):
                try:
                    yield folder.name, importlib.import_module(f"{package}.{file.name}")
                except ImportError:
                    assert folder.name in NEEDS_OTHER_PACKAGES


def looks_like_rms_norm(cls):
    """By its name, or by a name that ends in "Norm" over a body that takes a reciprocal square root."""
    if "RMS" in cls.__name__ or "Rms" in cls.__name__:
        return True
    if not cls.__name__.endswith("Norm"):
        return False
    try:
        codes = reachable_codes(cls)
    except Rejected:
        return False
    return any({"rsqrt", "rms_norm"} & set(code.co_names) for code in codes)


def build(cls):
    """An instance from the signature alone: sizes are `WIDTH`, a group is a quarter of it."""
    config = types.SimpleNamespace(
        hidden_size=WIDTH, rms_norm_eps=1e-6, eps=1e-6, layer_norm_eps=1e-6, gated_norm_rank=8, hidden_act="silu"
    )
    arguments = {}
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name == "config":
            arguments["config"] = config
        elif parameter.name == "feature_dims":
            arguments["feature_dims"] = (WIDTH,)
        elif parameter.name in ("dim", "hidden_size"):
            arguments[parameter.name] = WIDTH
        elif parameter.default is parameter.empty:
            arguments[parameter.name] = WIDTH // 4 if "group" in parameter.name else WIDTH
    return cls(**arguments)


@pytest.fixture(scope="session")
def classes():
    found = {}
    for folder, module in modelling_modules():
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__
            if own and looks_like_rms_norm(cls):
                found[f"{folder}.{name}"] = cls
    return found


@pytest.fixture(scope="session")
def matches(classes):
    return {name: infer_norm(build(cls)) for name, cls in classes.items()}


def test_every_class_is_matched_in_all_dtype_pairs_or_rejected_with_a_reason(matches):
    for name, match in matches.items():
        if match.spec is None:
            assert len(match.reason) > 10, name
        else:
            pairs = "27 dtype triples" if match.gating else f"{9 if match.hidden_size is not None else 3} dtype pairs"
            assert f"bit for bit in {pairs}" in match.reason, (name, match.reason)
            assert match.eps_attribute in ("eps", "variance_epsilon"), (name, match)
            assert match.weight_attribute == ("weight" if match.spec.has_weight else None), (name, match)


@pytest.mark.skipif(not transformers.__version__.startswith(PINNED_VERSION), reason=f"pinned on {PINNED_VERSION}")
def test_counts_per_variant(matches):
    plain = [match for match in matches.values() if match.spec is not None and match.gating is None]
    assert dict(Counter(variant_name(match.spec) for match in plain)) == COUNTS


@pytest.mark.skipif(not transformers.__version__.startswith(PINNED_VERSION), reason=f"pinned on {PINNED_VERSION}")
def test_gated_classes_and_what_they_compute(matches):
    gated = {name: match for name, match in matches.items() if match.gating is not None}
    assert {name: f"{variant_name(match.spec)} {match.gating}" for name, match in gated.items()} == GATED


def test_the_decision_counts_the_same_classes(repository):
    """By what is pinned here, so that no release of transformers is asked."""
    page = (repository / "docs" / "decisions" / "scanning.md").read_text()
    _, table = page.split("## Which classes match")
    counted = [int(n) for n in re.findall(r"\| \**(\d+)\** \|$", table.split("Of version")[0], flags=re.MULTILINE)]
    first = sum("group" in computes for computes in GATED.values())
    assert sorted(counted[:-4]) == sorted(COUNTS.values())
    assert counted[-4:] == [sum(COUNTS.values()), len(GATED) - first, first, len(REJECTED)]


def test_a_gated_match_is_the_class_s_own_result_bit_for_bit(classes, matches):
    for name, match in matches.items():
        if match.gating is None:
            continue
        norm = build(classes[name])
        for dtypes in product((torch.float32, torch.bfloat16, torch.float16), repeat=3):
            x, gate = torch.randn(2, 5, WIDTH).to(dtypes[0]), torch.randn(2, 5, WIDTH).mul(3).to(dtypes[1])
            norm.weight = nn.Parameter(torch.rand(WIDTH).add(0.5).to(dtypes[2]), requires_grad=False)
            own = norm(x, gate)
            ours = gated_rms_norm(x, gate, norm.weight, match.spec, match.gating)
            assert ours.dtype == own.dtype, (name, dtypes)
            assert torch.equal(ours, own), (name, dtypes)


@pytest.mark.skipif(not transformers.__version__.startswith(PINNED_VERSION), reason=f"pinned on {PINNED_VERSION}")
def test_rejected_classes_and_their_reasons(matches):
    rejected = {name: match.reason for name, match in matches.items() if match.spec is None}
    wrong = {name: reason for name, reason in rejected.items() if not reason.startswith(REJECTED.get(name, "?"))}
    assert wrong == {}
    assert sorted(rejected) == sorted(REJECTED)


def test_no_gated_norm_is_taken_for_a_plain_one_and_no_layer_norm_for_any(classes, matches):
    for name, match in matches.items():
        if "Gated" in name:
            assert infer_spec(build(classes[name])).spec is None, name
        elif name.endswith("LayerNorm") and "cohere" in name:
            assert match.spec is None, name


def test_groups_and_order_of_a_gated_norm(classes):
    falcon, mamba = classes["falcon_h1.FalconH1RMSNormGated"], classes["mamba2.MambaRMSNormGated"]
    first = infer_norm(falcon(WIDTH, n_groups=4, norm_before_gate=False))
    assert (first.gating, first.spec.group) == (GateSpec("silu", "gate_first"), 16)
    assert infer_norm(falcon(WIDTH, n_groups=4)).gating == GateSpec("silu", "norm_first")
    assert infer_norm(mamba(WIDTH, group_size=WIDTH)).spec.group is None


def test_weights_that_the_forward_never_reads_are_not_taken_for_weights(classes):
    match = infer_spec(build(classes["falcon_mamba.FalconMambaWeightlessRMSNorm"]))
    assert (match.spec.has_weight, match.weight_attribute, match.hidden_size) == (False, None, WIDTH)


def test_flags_and_groups(classes):
    gemma3n, grouped = classes["gemma3n.Gemma3nRMSNorm"], classes["qwen4_exp.Qwen4ExpTextRMSNorm"]
    assert infer_spec(gemma3n(WIDTH)).spec.has_weight
    assert not infer_spec(gemma3n(WIDTH, with_scale=False)).spec.has_weight
    assert infer_spec(grouped(WIDTH)).spec.group is None
    assert infer_spec(grouped(WIDTH, group_size=16)).spec.group == 16
    assert infer_spec(grouped(WIDTH, group_size=WIDTH)).spec.group is None
