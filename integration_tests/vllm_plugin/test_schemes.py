"""Quantisations whose engines gained nothing are told by vLLM's own configurations of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")

from rmsnorm_patch.vllm_plugin import schemes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from benchlib.quantised import CONFIGS


def configured(scheme: str) -> Any:
    """The QuantizationConfig that vLLM makes of a checkpoint's `quantization_config`."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    given = CONFIGS[scheme]
    return get_quantization_config(given["quant_method"]).from_config(dict(given))


@pytest.mark.parametrize(
    ("scheme", "said"),
    [("static", schemes.GIVEN_SCALE), ("token", ""), ("int8", ""), ("w4a16", ""), ("block", "")],
)
def test_checkpoints(scheme: str, said: str) -> None:
    """Of blocks the choice of products decides, and here there is no Hopper."""
    assert schemes.without_gain(configured(scheme)) == said


def test_fp8_of_vllm_itself() -> None:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    assert schemes.without_gain(Fp8Config(True, "static")) == schemes.GIVEN_SCALE
    assert schemes.without_gain(Fp8Config(True, "dynamic")) == ""
    assert schemes.without_gain(None) == ""


def test_blocks_follow_the_product_that_vllm_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("block")
    monkeypatch.setattr(schemes, "_quantises_inside", lambda: True)
    assert schemes.without_gain(config) == schemes.BLOCKS_INSIDE
    assert schemes.without_gain(configured("token")) == ""
