"""Quantised checkpoints: how config.json names each scheme, and the weights of a bf16 checkpoint quantised for it.

A benchmark's engine has dummy weights and needs the configuration alone. Weights are rounded to nearest, with the
largest magnitude of each part at the format's end. A static scale of the products' inputs is a number that is given.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK, GROUP = 128, 128
Weights = dict[str, torch.Tensor]


def _compressed(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    group["input_activations"] = None if inputs is None else {"symmetric": True, **inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_FP8, _INT8, _INT4 = ({"num_bits": bits, "type": type} for bits, type in ((8, "float"), (8, "int"), (4, "int")))
CONFIGS: dict[str, dict[str, Any]] = {
    "static": _compressed(
        "float-quantized", {**_FP8, "strategy": "tensor"}, {**_FP8, "strategy": "tensor", "dynamic": False}
    ),
    "token": _compressed(
        "float-quantized", {**_FP8, "strategy": "channel"}, {**_FP8, "strategy": "token", "dynamic": True}
    ),
    "block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "int8": _compressed(
        "int-quantized", {**_INT8, "strategy": "channel"}, {**_INT8, "strategy": "token", "dynamic": True}
    ),
    "w4a16": _compressed("pack-quantized", {**_INT4, "strategy": "group", "group_size": GROUP}, None),
}
"""Scheme -> `quantization_config`."""


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _static(weight: torch.Tensor, input_scale: float) -> Weights:
    scale = weight.abs().max() / 448
    given = torch.tensor([input_scale])
    return {"weight": _fp8(weight, scale), "weight_scale": scale.reshape(1), "input_scale": given}


def _token(weight: torch.Tensor, input_scale: float) -> Weights:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": _fp8(weight, scale), "weight_scale": scale}


def _block(weight: torch.Tensor, input_scale: float) -> Weights:
    rows, columns = weight.shape
    parts = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    parts = parts.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = (parts.abs().amax((1, 3)) / 448).clamp(min=1e-10)
    whole = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    return {"weight": _fp8(weight, whole), "weight_scale_inv": scale}


def _int8(weight: torch.Tensor, input_scale: float) -> Weights:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


def _w4a16(weight: torch.Tensor, input_scale: float) -> Weights:
    """Eight numbers of four bits in an int32, the first in the lowest bits, each 8 above what it stands for."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2) / 7
    steps = (groups / scale[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int32) + 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    packed = (steps.unflatten(1, (-1, 8)).to(torch.int64) << shifts).sum(2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": scale.to(torch.bfloat16), "weight_shape": shape}


_WEIGHTS: dict[str, Callable[[torch.Tensor, float], Weights]] = {
    "static": _static,
    "token": _token,
    "block": _block,
    "int8": _int8,
    "w4a16": _w4a16,
}


def quantise_checkpoint(source: Path, folder: Path, scheme: str, input_scale: float = 0.02) -> Path:
    """A copy of a checkpoint whose layers' products are quantised; input_scale: of "static", for all of them."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[scheme]}))
    tensors: Weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() == 2 and ".layers." in name:
            made = _WEIGHTS[scheme](tensor.float(), input_scale)
            tensors.update({name.removesuffix("weight") + part: value.contiguous() for part, value in made.items()})
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
