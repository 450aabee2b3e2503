"""Quantisations whose engines gained nothing are told by vLLM's own configurations of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

FP8 = {"dtype": "fp8_e4m3"}
MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
QUARK = {
    "static": {"weight": {**FP8, "qscheme": "per_tensor"}, "input_tensors": {**FP8, "is_dynamic": False}},
    "token": {"weight": {**FP8, "qscheme": "per_channel"}, "input_tensors": {**FP8, "is_dynamic": True}},
    "block": {"weight": {**FP8, "qscheme": "per_block"}, "input_tensors": {**FP8, "is_dynamic": True}},
    "weights alone": {"weight": {"dtype": "int4", "qscheme": "per_group"}, "input_tensors": None},
}
ONLINE = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "int8_per_channel_weight_only")
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PAGE = (ROOT / "docs" / "vllm_quantised.md").read_text().partition("## What is left to vLLM")[0]
PROGRAM = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
MODELOPT, QUARK, ONLINE = {MODELOPT!r}, {QUARK!r}, {ONLINE!r}
NAMED = {set(re.findall("`([a-z][a-z0-9_-]+)`", PAGE))!r}
from benchlib.quantised import CONFIGS
from rmsnorm_patch.vllm_plugin import schemes
from vllm.config.quantization import resolve_quantization_config
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
made = {{name: get_quantization_config(c["quant_method"]).from_config(dict(c)) for name, c in CONFIGS.items()}}
made |= {{f"fp8 {{scheme}}": Fp8Config(True, scheme) for scheme in ("static", "dynamic")}}
made |= {{f"modelopt {{way}}": ModelOptFp8Config(way, True, None, []) for way in MODELOPT}}
made |= {{f"quark {{way}}": QuarkConfig({{"global_quant_config": parts}}) for way, parts in QUARK.items()}}
in_blocks = {{"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True}}
in_groups = {{"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}}
compressed = dict(CONFIGS["token"], config_groups={{
    "group_0": {{"targets": ["Linear"], "weights": in_blocks, "input_activations": in_groups}}}})
made["compressed block"] = get_quantization_config("compressed-tensors").from_config(compressed)
made |= {{name: OnlineQuantizationConfig(resolve_quantization_config(name, None)) for name in ONLINE}}
here = {{name: schemes.without_gain(config) for name, config in made.items()}}
schemes._quantises_inside = lambda: True
hopper = {{name: schemes.without_gain(config) for name, config in made.items()}}
given = ("static", "fp8 static", "modelopt FP8", "quark static")
without = dict.fromkeys(given, schemes.GIVEN_SCALE)
blocks = ("block", "compressed block", "modelopt FP8_PB_WO", "quark block", "fp8_per_block")
assert here == {{**dict.fromkeys(made, ""), **without}}, here
assert hopper == {{**here, **dict.fromkeys(blocks, schemes.BLOCKS_INSIDE)}}, hopper
assert schemes.without_gain(None) == ""
assert set(QUANTIZATION_METHODS) <= NAMED, set(QUANTIZATION_METHODS) - NAMED  # each has a row on the page
"""


def test_checkpoints_of_each_scheme(
    environment: Callable[..., dict[str, str]], run_program: Callable[..., Any]
) -> None:
    """Of blocks the choice of products decides: there is no Hopper here, and then there is one."""
    done = run_program(["-c", PROGRAM], environment())
    assert done.returncode == 0, done.stderr[-3000:]
