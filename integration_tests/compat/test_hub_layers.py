"""Our layers through the `kernels` library itself: loaded from a folder, put over the classes of models."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from rmsnorm_patch.compat import hub_layers
from rmsnorm_patch.fused.gated_norm import op as gated_norm
from rmsnorm_patch.scan.gated import UNKNOWN
from rmsnorm_patch.scan.norms import Match, infer_gated
from rmsnorm_patch.scan.probe import same_bits

ROWS, COLUMNS = 16, 64
MODES = (kernels.Mode.INFERENCE, kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE, kernels.Mode.TRAINING)
HUB_DIFFERS = {
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": False,
    "transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm": True,
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssRMSNorm": True,
}
"""Whether the layer that the hub serves under the name "RMSNorm" rounds otherwise than the class does."""


def class_named(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def norm_of(cls: type, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    norm = cls(COLUMNS)
    for weight in norm.parameters():
        torch.nn.init.uniform_(weight, 0.3, 1.7)
    return norm.to(dtype).eval()


def rows(dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3.0 * torch.randn(ROWS, COLUMNS, generator=generator)).to(dtype)


def hub_definition(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What Liger's layer computes with the settings of the hub: x * rstd rounded to the input's type, then times the
    weight, whatever class it stands over."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return next(norm.parameters()) * h.to(x.dtype)


def kernel_ran(norm: torch.nn.Module) -> bool:
    """Whether the loaded copy, not the installed package, serves this norm."""
    loaded_layers = sys.modules[type(norm).forward.__module__]
    assert loaded_layers is not None
    return "rms_norm" in norm.forward.__func__.__code__.co_names


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("path", HUB_DIFFERS)
def test_each_class_keeps_its_own_numerics(path: str, kernelize) -> None:
    """The kernel's results beside the class's own and the hub layer's, counted in elements."""
    cls = class_named(path)
    norm, x = norm_of(cls), rows()
    own = cls.forward(norm, x)
    with torch.no_grad():
        kernelize(norm, {"RMSNorm": cls})
        assert kernel_ran(norm)
        ours = norm(x)
    assert ours.dtype == own.dtype
    differing = int((ours != own).sum())
    hub = int((hub_definition(norm, x) != own).sum())
    assert differing <= own.numel() // 200, differing  # another order of one sum, now and then one rounding
    assert (hub > own.numel() // 20) is HUB_DIFFERS[path], hub


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_zero_centred_and_gated_norms_of_qwen(kernelize, weight_dtype: torch.dtype) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    x, gate = rows(), rows(seed=2)
    centred = norm_of(qwen.Qwen3_5RMSNorm, weight_dtype)
    gated = norm_of(qwen.Qwen3_5RMSNormGated, weight_dtype)
    with torch.no_grad():
        own, own_gated = centred(x), gated(x, gate)
        kernelize(centred, {"RMSNormZeroCentered": qwen.Qwen3_5RMSNorm})
        kernelize(gated, {"RMSNormGated": qwen.Qwen3_5RMSNormGated})
        for ours, expected in ((centred(x), own), (gated(x, gate), own_gated), (gated(x, gate=gate), own_gated)):
            assert ours.dtype == expected.dtype
            assert int((ours != expected).sum()) <= expected.numel() // 200


def test_every_class_that_carries_a_name_is_known_or_left_to_itself(named_classes) -> None:
    """By behaviour: each class that this transformers marks, of each of the three names."""
    unknown = []
    for layer, cls in named_classes:
        norm = norm_of(cls, torch.float32)
        if layer == "RMSNormGated":
            match = infer_gated(norm)
            known, why = match.gating is not None, match.reason
        else:
            entry = hub_layers.served(norm)
            known, why = entry.run is not None, entry.reason
        if not known:
            unknown.append((cls.__name__, why))
    assert len(named_classes) > 100
    assert unknown == []


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("gate_first", [True, False])
def test_a_module_that_is_called_with_a_gate_and_without(gate_first: bool) -> None:
    """What is known of its calls with a gate says nothing of those without one, whichever come first."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    class Both(Qwen3_5RMSNormGated):
        def forward(self, hidden_states, gate=None):
            if gate is not None:
                return super().forward(hidden_states, gate)
            normed = hidden_states.float() * torch.rsqrt(
                hidden_states.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon
            )
            return self.weight * normed.to(hidden_states.dtype)

    norm, x, gate = norm_of(Both), rows(), rows(seed=2)
    for gated in (gate_first, not gate_first):
        got = hub_layers.rms_norm_gated(norm, x, gate) if gated else hub_layers.rms_norm(norm, x)
        torch.testing.assert_close(got, norm(x, gate) if gated else norm(x), rtol=0.01, atol=0.01)
    assert isinstance(hub_layers.served(norm, gated=True).run, gated_norm.Bound)
    assert hub_layers.served(norm).run is None


def test_gated_norms_are_told_apart() -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    found = {}
    for cls in (Qwen3_5RMSNormGated, KimiLinearRMSNormGated):
        match = infer_gated(norm_of(cls))
        assert match.gating is not None
        found[cls.__name__] = match.gating.activation, match.spec.round_before_weight
    assert found == {"Qwen3_5RMSNormGated": ("silu", "input"), "KimiLinearRMSNormGated": ("sigmoid", "none")}

    class Odd(Qwen3_5RMSNormGated):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states, gate) + 1

    assert infer_gated(norm_of(Odd)) == Match(None, UNKNOWN)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_model_gives_its_own_logits(small_model, kernelize, mode) -> None:
    """On the CPU no kernel is to be won: bit for bit the model's own, in each mode, with gradients and in training."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    ids = torch.arange(9)[None]
    model = small_model("qwen3", torch.bfloat16)
    expected = model(ids).logits
    kernelize(model, {"RMSNorm": Qwen3RMSNorm}, mode)
    norms = [m for m in model.modules() if isinstance(m, Qwen3RMSNorm)]
    assert len(norms) == 9
    assert all("forward" in norm.__dict__ for norm in norms)
    assert same_bits(model(ids).logits, expected)
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert norms[0].weight.grad is not None
    assert norms[0].weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"mode": "reduce-overhead"}], ids=str)
def test_compiled_graphs_hold_the_class_s_own_arithmetic(kernelize, options: dict) -> None:
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    norm, x = norm_of(Olmo2RMSNorm), rows()
    kernelize(norm, {"RMSNorm": Olmo2RMSNorm}, kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE)
    with torch.no_grad():
        expected = torch.compile(lambda y: Olmo2RMSNorm.forward(norm, y), fullgraph=True, **options)(x)
        assert same_bits(torch.compile(norm, fullgraph=True, **options)(x), expected)


@pytest.mark.usefixtures("interpreted")
def test_what_a_kernel_must_not_serve_runs_the_class_s_own_forward(kernelize) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, x = norm_of(LlamaRMSNorm), rows()
    kernelize(norm, {"RMSNorm": LlamaRMSNorm})
    own = LlamaRMSNorm.forward(norm, x)
    assert same_bits(norm(x.requires_grad_(True)), own)  # a gradient is wanted
    norm(x).sum().backward()
    assert x.grad is not None
    x = x.detach()
    with torch.no_grad():
        half = norm(rows(torch.float16))  # a weight of another half type
        assert same_bits(half, LlamaRMSNorm.forward(norm, rows(torch.float16)))
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(norm(x), own)
        norm.variance_epsilon = 3.0  # read at each call
        assert (norm(x).float() - LlamaRMSNorm.forward(norm, x).float()).abs().max() < 0.05


def test_the_folder_needs_no_installed_package(kernel_folder: Path) -> None:
    """In a process that cannot import rmsnorm_patch the folder's own copy runs, its ops under its own namespace."""
    variant = "cpu" if torch.version.cuda is None else "cuda"  # a build for CUDA takes that one without a GPU too
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rmsnorm_patch":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, kernels
from pathlib import Path
layer = kernels.LocalLayerRepository(Path({str(kernel_folder)!r}), layer_name="RMSNorm").load()
norm = torch.nn.RMSNorm(64, eps=1e-6).eval()
x = torch.randn(4, 64)
with torch.no_grad():
    y = layer.forward(norm, x)
torch.testing.assert_close(y, norm(x))
served = sys.modules[layer.__module__].rms_norm.__globals__["_SERVED"]
run = served[False][norm].run
assert run.backend == "triton" and run.__class__.__module__.startswith("_rmsnorm_patch_{variant}_"), run
assert not any(name.partition(".")[0] == "rmsnorm_patch" for name in sys.modules)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "RMSNORM_PATCH_BACKEND": "triton", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=kernel_folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_folder_is_whole(kernel_folder: Path, repository: Path, tmp_path: Path) -> None:
    """Every relative import leads to a file of the folder; the same sources give the same bytes; ids differ."""
    ids = set()
    for variant in (kernel_folder / "build").iterdir():
        ids.add(json.loads((variant / "metadata.json").read_text())["id"])
        assert (variant / "package" / "kernels" / "cuda" / "rms_norm_rows.cu").is_file()
        assert (variant / "package" / "backends" / "cuda" / "launcher" / "launcher.c").is_file()
        for path in (variant / "package").rglob("*.py"):
            if path == variant / "package" / "__init__.py":
                continue  # names what the folder leaves out, and imports it late
            assert missing_imports(path) == [], path
    assert len(ids) == 2
    again = tmp_path / "again"
    subprocess.run([sys.executable, repository / "scripts" / "kernel_folder.py", again], check=True)
    files = sorted(p.relative_to(again) for p in again.rglob("*.*") if p.is_file())
    assert all((again / f).read_bytes() == (kernel_folder / f).read_bytes() for f in files)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    words = [sys.executable, repository / "scripts" / "kernel_folder.py", tmp_path / "mine"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 1
    assert (tmp_path / "mine" / "thesis.txt").exists()


def missing_imports(path: Path) -> list[str]:
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            base = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
            if not (base.is_dir() or base.with_suffix(".py").is_file()):
                missing.append(f"{'.' * node.level}{node.module}")
    return missing
