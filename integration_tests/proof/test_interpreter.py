"""The real Triton kernels, run by Triton's interpreter on the CPU, under a proof."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = textwrap.dedent(
    """
    import sys
    sys.path[:0] = [{folder!r}, {root!r}]
    import torch
    from proof_models import build, prompts
    from rmsnorm_patch import apply, verify
    from rmsnorm_patch.proof import probes

    probes._ELEMENTS = 1 << 12  # the interpreter takes a millisecond for what a GPU does in a nanosecond
    model = build({kind!r}, torch.{dtype}, num_hidden_layers=1)
    apply(model, backend="triton")
    proof = verify(model, prompts(1, 4), greedy_tokens=2)
    assert all(set(site.backends) == {{"triton"}} for site in proof.sites), proof.sites
    assert {{m.backend for site in proof.sites for m in site.measurements}} == {{"triton"}}
    print(proof.explain())
    """
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("qwen3", "bfloat16"), ("gemma2", "float32")])
def test_triton_kernels_are_proved_in_the_interpreter(kind: str, dtype: str) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    folder = Path(__file__).parent
    program = PROGRAM.format(folder=str(folder), root=str(folder.parents[1]), kind=kind, dtype=dtype)
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ": proved" in ran.stdout
