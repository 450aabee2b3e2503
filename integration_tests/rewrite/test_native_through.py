"""launcher.c with sums that pass through a block around their layer (T5): its checks see the block too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_driver import Driver, table_of
from torch import nn
from transformers import T5Config, T5EncoderModel

import rmsnorm_patch
from rmsnorm_patch.rewrite import layer_calls, native

TOKENS = torch.arange(1, 8)[None]
PAIRS = 4
"""Two blocks of two sub-layers: each sum is read by one norm."""


@pytest.fixture
def patched(launchers: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Driver]:
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(d_model=64, d_kv=16, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)).eval()
    rmsnorm_patch.apply(model)
    norm = model.encoder.final_layer_norm
    kernel = layer_calls.kernel_of(norm)
    assert kernel is not None
    table = table_of("fused_add_rms_norm", type(norm)._rmsnorm_patch_key.spec, 64)
    monkeypatch.setattr(kernel.fused, "table", table)
    native.enroll(type(norm), kernel)
    with torch.no_grad():
        model(TOKENS)
    monkeypatch.setattr(layer_calls, "_called_by_loop", lambda link: False)  # from here on C alone hands over
    return model, Driver(launchers)


def launches(model: nn.Module, found: Driver) -> tuple[torch.Tensor, int]:
    start = found.launches
    with torch.no_grad():
        result = model(TOKENS)[0]
    return result, found.launches - start


def test_every_pair_is_one_launch(patched) -> None:
    assert launches(*patched)[1] == PAIRS


def edit(module: nn.Module, arguments: tuple, output: tuple | None = None) -> None:
    (arguments if output is None else output)[0].data[..., :9].add_(2.0)


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "hook": lambda m: m.encoder.block[0].register_forward_hook(edit),
    "pre-hook": lambda m: m.encoder.block[1].register_forward_pre_hook(edit),
    "forward": lambda m: setattr(m.encoder.block[0], "forward", lambda *a, **k: (torch.ones(1, 7, 64), None, None)),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_block_that_is_watched_hands_nothing_over(patched, what: str) -> None:
    model, found = patched
    EDITS[what](model)
    edited, count = launches(model, found)
    assert count < PAIRS
    rmsnorm_patch.revert(model)
    with torch.no_grad():
        assert torch.allclose(edited, model(TOKENS)[0], rtol=1e-4, atol=1e-5)
