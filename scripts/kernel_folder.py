"""Write a folder that Hugging Face's `kernels` loads: our norms as layers for `kernelize`. Needs no GPU.

    python scripts/kernel_folder.py FOLDER

The folder holds the package itself, without its command line, proof and plugin, and the kernels' sources; nothing of
an installed rmsnorm_patch is used. Its ops get a namespace of their own, so that the folder and an installed package
live in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rmsnorm_patch  # noqa: E402

LEFT_OUT = (
    *("api.py", "__main__.py", "bench", "cli", "proof", "vllm_plugin", "py.typed"),
    *("compat/sglang.py", "compat/sglang_plugin.py", "fused/norm_quantised", "fused/silu_quantised"),
)
"""Of the package: what no layer needs."""
BACKENDS = ("cpu", "cuda")
NAME = "rmsnorm-patch"
VERSION = 1
"""The library's own number of a kernel, a whole one: raise it with each upload."""
MINIMUM = "0.17.0"

INIT = '''"""RMSNorm layers that compute what the model's own class computes."""

import importlib.util

_MISSING = [name for name in ("filelock", "platformdirs") if importlib.util.find_spec(name) is None]
if _MISSING:
    raise ImportError(f"rmsnorm-patch needs {', '.join(_MISSING)}; supported: any recent release; pip install them")

from . import layers  # noqa: E402

__all__ = ["layers"]
'''
LAYERS = '''"""The layers by the names under which models ask for them. Each is stateless, as `kernelize` wants it."""

import torch
import torch.nn as nn

from .package.compat.hub_layers import rms_norm, rms_norm_gated

__all__ = ["RMSNorm", "RMSNormGated", "RMSNormZeroCentered"]


class RMSNorm(nn.Module):
    """Any norm of one weight: which, is found by running the model's own class on probes."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(self, hidden_states)


class RMSNormZeroCentered(nn.Module):
    """The same; models ask for (1 + weight) under this name."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(self, hidden_states)


class RMSNormGated(nn.Module):
    """A norm times the activation of a gate."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor = None) -> torch.Tensor:
        return rms_norm_gated(self, hidden_states, gate)
'''
CARD = """# rmsnorm-patch {version}

RMSNorm layers for `kernelize`. Each computes what the model's own class computes, bit for bit in its definition:
the class is run on probes once. Where no kernel may serve a call, the class's own forward runs.

```python
from transformers import AutoModelForCausalLM, KernelConfig

config = KernelConfig({{"RMSNorm": "/path/to/this/folder:RMSNorm"}}, use_local_kernel=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, use_kernels=True, kernel_config=config, device_map="cuda")
```

Layers: `RMSNorm`, `RMSNormZeroCentered`, `RMSNormGated`. Needs torch, `filelock` and `platformdirs`.
Kernels are compiled for the GPU at hand by NVRTC, or by Triton. Licence: Apache-2.0.
"""


def package_files() -> dict[str, bytes]:
    """Path inside a variant -> content: the package and the kernels' sources."""
    package = ROOT / "rmsnorm_patch"
    found = {}
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package).as_posix()
        if path.is_dir() or "__pycache__" in path.parts or any(name == o or name.startswith(f"{o}/") for o in LEFT_OUT):
            continue
        found[f"package/{name}"] = path.read_bytes()
    for path in sorted((ROOT / "kernels").rglob("*.*")):
        if path.is_file() and "__pycache__" not in path.parts:
            found[f"package/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    return found


def renamed(files: dict[str, bytes], namespace: str) -> dict[str, bytes]:
    """The ops under `namespace`: a process can register each namespace once."""
    changed = dict(files)
    for name, old, count in (
        ("package/ops/library.py", 'NAMESPACE = "rmsnorm_patch"', 1),
        ("package/ops/library.py", "torch.ops.rmsnorm_patch,", 1),
        ("package/ops/bound.py", "torch.ops.rmsnorm_patch,", 1),
    ):
        text = changed[name].decode()
        if text.count(old) != count:
            raise SystemExit(f"{name}: {old!r} stands there {text.count(old)} times, not {count}; correct this script")
        changed[name] = text.replace(old, old.replace("rmsnorm_patch", namespace)).encode()
    return changed


def digest(files: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, content in sorted(files.items()):
        total.update(f"{name} {len(content)}\n".encode() + content)
    return total.hexdigest()[:12]


def write(folder: Path) -> None:
    """Write `folder` anew. Raises SystemExit where something else than such a folder stands there."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "build" / "torch-cpu" / "metadata.json").exists():
        raise SystemExit(f"{folder} holds other files; supported: a new folder, or one of an earlier run")
    shutil.rmtree(folder, ignore_errors=True)
    files = {**package_files(), "__init__.py": INIT.encode(), "layers.py": LAYERS.encode()}
    for backend in BACKENDS:
        unique = f"_rmsnorm_patch_{backend}_{digest(files)}"
        metadata = {
            "id": unique,
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "kernels-minver": MINIMUM,
            "python-depends": [],
            "backend": {"type": backend},
        }
        content = renamed(files, unique.strip("_"))
        content["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
        for name, data in content.items():
            path = folder / "build" / f"torch-{backend}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (folder / "README.md").write_text(CARD.format(version=rmsnorm_patch.__version__))
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", __doc__ or "")[0])
    parser.add_argument("folder", type=Path, help="where to write; an earlier one is replaced")
    folder = parser.parse_args().folder.resolve()
    write(folder)
    print(f'{folder}: KernelConfig({{"RMSNorm": "{folder}:RMSNorm"}}, use_local_kernel=True)')


if __name__ == "__main__":
    main()
