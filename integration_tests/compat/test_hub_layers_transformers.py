"""Our layers through transformers' own `KernelConfig`, in the release that takes the installed `kernels`.

transformers marks its classes only beside the release of `kernels` that it names; 5.22 names 0.17. On the CPU, which
`KernelConfig` does not serve, the library's mapping puts the layers in place; with a GPU `set_use_kernels` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

WANTED = "transformers==5.22.*"
PROGRAM = """
import json, sys
from pathlib import Path
import torch, transformers, kernels
from transformers import AutoConfig, AutoModelForCausalLM, KernelConfig
from transformers.utils.import_utils import is_kernels_available

assert transformers.__version__.startswith("5.22."), transformers.__version__
assert is_kernels_available()
folder, device = Path(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu"
sizes = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
             linear_key_head_dim=16, linear_value_head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
found = {}
for kind, layers in (("olmo2", ["RMSNorm"]), ("qwen3_5_text", ["RMSNormZeroCentered", "RMSNormGated"])):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)
    model = model.to(device).eval()
    for name, weight in model.named_parameters():
        if "norm" in name and weight.ndim == 1:
            torch.nn.init.uniform_(weight, 0.3, 1.7)
    config = KernelConfig({name: f"{folder}:{name}" for name in layers}, use_local_kernel=True, inherit_mapping=False)
    config.sanitize_kernel_mapping(model)
    if device == "cuda":
        model.set_use_kernels(True, config)
    else:
        mapping = {name: {"cpu": kernels.LocalLayerRepository(folder, layer_name=name)} for name in layers}
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    counts = dict(norms=0, elements=0, differing=0, classes=[])
    def compare(module, given, result):
        own = type(module).forward(module, *given)
        assert own.dtype == result.dtype
        counts["elements"] += own.numel()
        counts["differing"] += int((own != result).sum())
        counts["classes"] = sorted({*counts["classes"], type(module).__name__})
    for module in model.modules():
        if getattr(type(module), "kernel_layer_name", None) in layers and "forward" in module.__dict__:
            module.register_forward_hook(compare)
            counts["norms"] += 1
    with torch.no_grad():
        model(torch.arange(3, 20, device=device)[None])
    found[kind] = counts
print(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.skipif(not version("kernels").startswith("0.17."), reason="transformers 5.22 takes kernels 0.17")
def test_transformers_loads_the_folder(kernel_folder: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "older"), WANTED]
    subprocess.run(pip, check=True)
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1", "RMSNORM_PATCH_BACKEND": "triton"}
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "older"),
        **interpreted,
        "HF_HUB_OFFLINE": "1",
    }
    words = [sys.executable, "-c", PROGRAM, str(kernel_folder)]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["olmo2"]["classes"] == ["Olmo2RMSNorm"]
    assert found["qwen3_5_text"]["classes"] == ["Qwen3_5RMSNorm", "Qwen3_5RMSNormGated"]
    for counts in found.values():
        assert counts["norms"] >= 9
        assert counts["differing"] <= counts["elements"] // 200, counts
