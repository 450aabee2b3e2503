"""The shipped Llama with quantised products, as Hugging Face's libraries make them: real modules and real weights.

transformers' own product of fine-grained FP8 is a kernel of the hub, which no test downloads: `product` stands for it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
TINY_LLAMA = HERE / "data" / "tiny-llama"
sys.path.insert(0, str(HERE.parent / "scripts"))
from benchlib.quantised import BLOCK, quantise_checkpoint  # noqa: E402

from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise  # noqa: E402

LIBRARIES = {"compressed": "compressed_tensors", "optimized": "compressed_tensors", "torchao": "torchao"}
"""First word of a kind of model -> what makes its products; transformers makes those of the others."""
HELD = "_FINEGRAINED_FP8"
"""The name under which transformers keeps what it downloaded."""


def product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, block_size: Any, dtype: torch.dtype, **_: Any
) -> torch.Tensor:
    """x [..., K] is quantised in groups of 128, then multiplied with weight [N, K] of blocks of 128 x 128."""
    rows, row_scales = quantise(x, QuantSpec("fp8_block"))
    left = rows.float() * row_scales.repeat_interleave(BLOCK, -1)[..., : x.shape[-1]]
    whole = scales.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    right = weight.float() * whole[: weight.shape[0], : weight.shape[1]]
    return (left @ right.t()).to(dtype)


@contextmanager
def product_of_the_hub() -> Iterator[None]:
    """`product` in the place of the kernel that transformers would download."""
    from transformers.integrations import finegrained_fp8

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(finegrained_fp8, HELD):
            patch.setattr(finegrained_fp8, HELD, finegrained_fp8.FineGrainedFP8(product, product, product))
        patch.setenv("TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR", "1")  # another kernel of the hub
        yield


def fine_grained(folder: Path, device: str) -> PreTrainedModel:
    """transformers' `FP8Linear` with blocks of 128 x 128, put in as its loader does on a GPU, and on no CPU."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations import finegrained_fp8

    if not hasattr(finegrained_fp8, HELD):
        pytest.skip("this transformers keeps the hub's product elsewhere")
    checkpoint = quantise_checkpoint(TINY_LLAMA, folder, "block")
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.bfloat16)
    finegrained_fp8.replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config(), pre_quantized=True)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False, assign=True)
    return model.eval().to(device)


def compressed(folder: Path, device: str, scheme: str = "token") -> PreTrainedModel:
    """As compressed-tensors loads it: FP8 until the first forward, then dense weights behind its quantisations."""
    checkpoint = quantise_checkpoint(TINY_LLAMA, folder, scheme)
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().to(device)


def optimized(folder: Path) -> PreTrainedModel:
    """transformers' own FP8 product of a compressed-tensors checkpoint; needs a GPU."""
    from transformers import CompressedTensorsConfig

    if "use_optimized_inference" not in inspect.signature(CompressedTensorsConfig).parameters:
        pytest.skip("this transformers has no product for compressed-tensors")
    wanted = CompressedTensorsConfig(use_optimized_inference=True)
    checkpoint = quantise_checkpoint(TINY_LLAMA, folder, "token")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=wanted)
    return model.eval().to("cuda")


def torchao(config: str, device: str) -> PreTrainedModel:
    """config: the name of one of torchao's."""
    import torchao.quantization
    from transformers import TorchAoConfig

    wanted = TorchAoConfig(getattr(torchao.quantization, config)())
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.bfloat16, quantization_config=wanted)
    return model.eval().to(device)


def made(kind: str, folder: Path, device: str) -> PreTrainedModel:
    """ "fine-grained", "compressed SCHEME", "optimized" or "torchao CONFIG". Skips where its library is not installed.

    folder: where a checkpoint is written, new for each.
    """
    way, _, which = kind.partition(" ")
    library = LIBRARIES.get(way)
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed here")
    if way == "compressed":
        return compressed(folder, device, which)
    if way == "optimized":
        return optimized(folder)
    return torchao(which, device) if way == "torchao" else fine_grained(folder, device)
