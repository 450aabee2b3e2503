"""Hub layers and SGLang's function on a GPU: kernels run, numerics are the class's own, graphs replay them."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rmsnorm_patch.compat.sglang import SPEC, fused_add_rmsnorm
from rmsnorm_patch.numerics import reference

pytestmark = pytest.mark.gpu

CLASSES = {
    "RMSNorm": (
        "transformers.models.llama.modeling_llama.LlamaRMSNorm",
        "transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm",
    ),
    "RMSNormZeroCentered": ("transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5RMSNorm",),
    "RMSNormGated": ("transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5RMSNormGated",),
}
HUB = importlib.util.find_spec("kernels.layer") is not None  # `kernels` alone is a folder of this checkout too
SHARE = 200
"""One element in so many may differ: the kernel adds a row's squares in another order than PyTorch."""


@pytest.fixture(scope="module")
def folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hub") / "rmsnorm-patch"
    subprocess.run([sys.executable, repository / "scripts" / "kernel_folder.py", made], check=True)
    return made


@pytest.mark.skipif(not HUB, reason="the package kernels is not installed")
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("layer", "path"), [(layer, path) for layer, paths in CLASSES.items() for path in paths])
def test_a_hub_layer_keeps_the_class_s_numerics(
    folder: Path, layer: str, path: str, weight_dtype: torch.dtype, compiled_code: ModuleType
) -> None:
    """Compiled, its code is that of the class. Bits are not asked: those of two compilations of one code may differ."""

    def compiled(forward_of: Any) -> Callable[..., torch.Tensor]:
        return torch.compile(lambda *y: forward_of.forward(norm, *y), fullgraph=True)

    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    norm = cls(2048).to("cuda", weight_dtype).eval()
    torch.nn.init.uniform_(norm.weight, 0.3, 1.7)
    x = torch.randn(33, 2048, device="cuda", dtype=torch.bfloat16)
    given = (x, torch.randn_like(x)) if layer == "RMSNormGated" else (x,)
    from kernels import LocalLayerRepository

    made = LocalLayerRepository(folder, layer_name=layer).load()
    with torch.no_grad():
        own, ours = cls.forward(norm, *given), made.forward(norm, *given)
        served = sys.modules[made.__module__].rms_norm.__globals__["served"](norm, layer == "RMSNormGated")
        assert served.run is not None
        assert served.run.backend_for(*given, norm.weight) in ("cuda", "triton")
        assert ours.dtype == own.dtype
        assert int((ours != own).sum()) <= own.numel() // SHARE
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = made.forward(norm, *given)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(replayed, made.forward(norm, *given))
        own, code = compiled_code.compiled_anew(lambda: compiled(cls)(*given))
        ours, hub_code = compiled_code.compiled_anew(lambda: compiled(made)(*given))
        assert hub_code == code
        assert int((ours != own).sum()) <= own.numel() // SHARE


@pytest.mark.parametrize("enable_pdl", [None, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sglang_s_function(dtype: torch.dtype, enable_pdl: bool | None) -> None:
    """Against the definition, and against the function that SGLang calls where it is installed."""
    x, residual = (torch.randn(65, 4096, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.rand(4096, device="cuda", dtype=dtype)
    normed, total = reference.fused_add_rms_norm(x, residual, weight, SPEC, 1e-6)
    ours = x.clone(), residual.clone()
    fused_add_rmsnorm(*ours, weight, 1e-6, enable_pdl)
    assert torch.equal(ours[1], total)
    assert int((ours[0] != normed).sum()) <= normed.numel() // SHARE
    for name in ("sgl_kernel", "flashinfer.norm"):
        try:
            theirs = importlib.import_module(name).fused_add_rmsnorm
        except ImportError:
            continue
        other = x.clone(), residual.clone()
        theirs(*other, weight, 1e-6)
        assert torch.equal(other[1], ours[1]), name
        assert int((other[0] != ours[0]).sum()) <= normed.numel() // SHARE, name
