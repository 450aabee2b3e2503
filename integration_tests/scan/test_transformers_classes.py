"""Every RMSNorm-like class of transformers: matched to one spec in all dtype pairs, or rejected with a reason."""

import importlib
import inspect
import pkgutil
import types
from collections import Counter

import pytest
import torch.nn as nn
import transformers
import transformers.models

from rmsnorm_patch.scan.norms import infer_spec, variant_name
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

NEEDS_GATE = "its forward needs further arguments (gate)"
MAY_GATE = "its forward takes an optional argument that changes the result (gate)"
MEAN = "it subtracts the mean"
FACTOR = "it rounds 1 / rms to the input's dtype"
UNRUNNABLE = "its forward cannot be run on one tensor [2, 4, N] on the CPU (ValueError: "
REJECTED = {
    "axk2.AXK2GatedRMSNorm": "it has sub-modules (norm, mlp)",
    "bailing_hybrid.BailingHybridRMSNormGated": MAY_GATE,
    "bamba.BambaRMSNormGated": MAY_GATE,
    "cohere.CohereLayerNorm": MEAN,
    "cohere2.Cohere2LayerNorm": MEAN,
    "cohere2_moe.Cohere2MoeLayerNorm": MEAN,
    "cohere_compass.CohereCompassLayerNorm": MEAN,
    "deepseek_v4.DeepseekV4UnweightedRMSNorm": FACTOR,
    "dory.DoryL2Norm": "it divides by the square root of the sum of squares, not of their mean",
    "falcon_h1.FalconH1RMSNormGated": MAY_GATE,
    "gemma3n.Gemma3nAudioCumulativeGroupNorm": UNRUNNABLE + "Input tensor shape suffix",
    "glm5_next.Glm5NextTextRMSNormGated": MAY_GATE,
    "glm5_next.Glm5NextTextUnweightedRMSNorm": FACTOR,
    "gradium_phonon_tts.GradiumPhononTTSFlowLayerNorm": "it has a bias",
    "gradium_phonon_tts.GradiumPhononTTSTimestepNorm": "it computes an RMSNorm in another order of operations",
    "granitemoehybrid.GraniteMoeHybridRMSNormGated": MAY_GATE,
    "hy_v4.HYV4UnweightedRMSNorm": "it returns the factor 1 / rms alone",
    "hy_v4_vl.HYV4VLUnweightedRMSNorm": "it returns the factor 1 / rms alone",
    "kimi_linear.KimiLinearRMSNormGated": MAY_GATE,
    "lara_mini.LaraMiniRMSNormGated": MAY_GATE,
    "mamba2.MambaRMSNormGated": MAY_GATE,
    "muse_spark.MuseSparkTextInputScaledRMSNorm": "it multiplies by the weight before the normalisation",
    "nemotron_h.NemotronHRMSNormGated": MAY_GATE,
    "olmo_hybrid.OlmoHybridRMSNormGated": NEEDS_GATE,
    "pocket_tts.PocketTTSFlowLayerNorm": "it has a bias",
    "pocket_tts.PocketTTSTimestepNorm": "it divides by the standard deviation about the mean",
    "qwen3_5.Qwen3_5RMSNormGated": NEEDS_GATE,
    "qwen3_5_moe.Qwen3_5MoeRMSNormGated": NEEDS_GATE,
    "qwen3_next.Qwen3NextRMSNormGated": NEEDS_GATE,
    "qwen4_exp.Qwen4ExpTextRMSNormGated": NEEDS_GATE,
    "voxtral_realtime.VoxtralRealtimeTextAdaRmsNorm": "it has sub-modules",
    "xlstm.xLSTMMultiHeadLayerNorm": UNRUNNABLE + "not enough values to unpack (expected 4",
    "zamba2.Zamba2RMSNormGated": MAY_GATE,
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
    return {name: infer_spec(build(cls)) for name, cls in classes.items()}


def test_every_class_is_matched_in_all_dtype_pairs_or_rejected_with_a_reason(matches):
    for name, match in matches.items():
        if match.spec is None:
            assert len(match.reason) > 10, name
        else:
            pairs = 9 if match.hidden_size is not None else 3
            assert f"bit for bit in {pairs} dtype pairs" in match.reason, (name, match.reason)
            assert match.eps_attribute in ("eps", "variance_epsilon"), (name, match)
            assert match.weight_attribute == ("weight" if match.spec.has_weight else None), (name, match)


@pytest.mark.skipif(not transformers.__version__.startswith(PINNED_VERSION), reason=f"pinned on {PINNED_VERSION}")
def test_counts_per_variant(matches):
    counted = Counter(variant_name(match.spec) for match in matches.values() if match.spec is not None)
    assert dict(counted) == COUNTS


@pytest.mark.skipif(not transformers.__version__.startswith(PINNED_VERSION), reason=f"pinned on {PINNED_VERSION}")
def test_rejected_classes_and_their_reasons(matches):
    rejected = {name: match.reason for name, match in matches.items() if match.spec is None}
    wrong = {name: reason for name, reason in rejected.items() if not reason.startswith(REJECTED.get(name, "?"))}
    assert wrong == {}
    assert sorted(rejected) == sorted(REJECTED)


def test_no_gated_norm_and_no_layer_norm_is_taken(matches):
    for name, match in matches.items():
        if "Gated" in name or (name.endswith("LayerNorm") and "cohere" in name):
            assert match.spec is None, name


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
