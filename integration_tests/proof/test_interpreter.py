"""The real Triton kernels, run by Triton's interpreter on the CPU, under a proof."""

from __future__ import annotations

import pytest
import torch
from proof_models import build, prompts

from rmsnorm_patch import apply, verify
from rmsnorm_patch.proof import probes

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("qwen3", torch.bfloat16), ("gemma2", torch.float32)])
def test_triton_kernels_are_proved_in_the_interpreter(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(probes, "_ELEMENTS", 1 << 10)  # it takes a millisecond for what a GPU does in a nanosecond
    model = build(kind, dtype, num_hidden_layers=1)
    apply(model, backend="triton")
    proof = verify(model, prompts(1, 4), greedy_tokens=2)
    assert all(set(site.backends) == {"triton"} for site in proof.sites), proof.sites
    assert {m.backend for site in proof.sites for m in site.measurements} == {"triton"}
    assert ": proved" in proof.explain()
