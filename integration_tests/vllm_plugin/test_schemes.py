"""Quantisations whose engines gained nothing are told by vLLM's own configurations of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")
pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PROGRAM = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from benchlib.quantised import CONFIGS
from rmsnorm_patch.vllm_plugin import schemes
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
made = {{name: get_quantization_config(c["quant_method"]).from_config(dict(c)) for name, c in CONFIGS.items()}}
made |= {{f"fp8 {{scheme}}": Fp8Config(True, scheme) for scheme in ("static", "dynamic")}}
here = {{name: schemes.without_gain(config) for name, config in made.items()}}
schemes._quantises_inside = lambda: True
hopper = {{name: schemes.without_gain(config) for name, config in made.items()}}
without = {{"static": schemes.GIVEN_SCALE, "fp8 static": schemes.GIVEN_SCALE}}
assert here == {{**dict.fromkeys(made, ""), **without}}, here
assert hopper == {{**here, "block": schemes.BLOCKS_INSIDE}}, hopper
served = {{name: schemes.without_gain(config, blocks=True) for name, config in made.items()}}
assert served == here, served
assert schemes.without_gain(None) == ""
"""


def test_checkpoints_of_each_scheme(
    environment: Callable[..., dict[str, str]], run_program: Callable[..., Any]
) -> None:
    """Of blocks the choice of products decides: there is no Hopper here, and then there is one."""
    done = run_program(["-c", PROGRAM], environment())
    assert done.returncode == 0, done.stderr[-3000:]
