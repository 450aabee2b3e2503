"""The attentions of transformers: which forwards show the norms of a query and a key, and relatives that see."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers

import rmsnorm_patch
from rmsnorm_patch.pairs import query_key as reading

SHOWN = 73
"""Classes of transformers 5.24 whose forward shows the norms of a query and a key, RMSNorms or not."""
NOT_SHOWN = {
    "code runs between the two norms": 6,
    "the two norms stand in different branches": 4,
    "both norms stand in one statement": 3,
    "k_norm reads what is computed after q_norm": 2,
}


class Sums:
    """What `find` asks of a source."""

    sums: frozenset[str] = frozenset()


def forwards() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for cls in ast.parse(path.read_text()).body:
            for function in cls.body if isinstance(cls, ast.ClassDef) else ():
                if isinstance(function, ast.FunctionDef) and function.name == "forward":
                    yield cls.name, function


@pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="pinned for transformers 5.24")
def test_every_attention_of_transformers_is_read() -> None:
    shown, others = set(), Counter()
    for name, function in forwards():
        called = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
        attributes = {f.attr for f in called if isinstance(f, ast.Attribute) and ast.unparse(f.value) == "self"}
        norms = frozenset(attribute for attribute in attributes if "norm" in attribute)
        for found in reading.find(Sums(), function, norms):  # type: ignore[arg-type]
            if found.named and not found.reason:
                shown.add(name)
            elif found.named:
                others[found.reason] += 1
    assert {"Qwen3VLTextAttention", "Qwen3OmniMoeThinkerTextAttention", "Olmo3Attention", "Llama4TextAttention"} < shown
    assert len(shown) == SHOWN
    assert dict(others) == NOT_SHOWN


@pytest.mark.skipif(importlib.util.find_spec("transformers.models.qwen3_vl") is None, reason="an older transformers")
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe", "glm_ocr", "internvl"])
def test_relatives_that_see(kind: str) -> None:
    """Text and vision attentions of models that are no causal LMs."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    configuration = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
    torch.manual_seed(0)
    attention, inputs = ATTENTIONS[kind](module, configuration)
    holder = nn.ModuleDict({"attention": attention.eval()})
    before = attention_outputs(attention, inputs)
    report = rmsnorm_patch.apply(holder)
    assert report.counts()["query_key/fuse"] == 1
    assert torch.equal(before, attention_outputs(attention, inputs))
    assert rmsnorm_patch.status(holder).counts()["reference"] == 2


@torch.no_grad()
def attention_outputs(attention: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = attention(**inputs)
    return result[0] if isinstance(result, tuple) else result


def text(name: str, config: str) -> Callable[..., tuple[nn.Module, dict[str, Any]]]:
    def make(module: Any, configuration: Any) -> tuple[nn.Module, dict[str, Any]]:
        made = getattr(configuration, config)(
            hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=1
        )
        made._attn_implementation = "eager"
        cos = torch.linspace(0, 1, 5 * 16).view(1, 5, 16)
        inputs = {"hidden_states": torch.randn(1, 5, 64), "position_embeddings": (cos, cos), "attention_mask": None}
        return getattr(module, name)(made, layer_idx=0), inputs

    return make


def vision(name: str, config: str, rotated: bool) -> Callable[..., tuple[nn.Module, dict[str, Any]]]:
    def make(module: Any, configuration: Any) -> tuple[nn.Module, dict[str, Any]]:
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_heads": 4, "use_qk_norm": True}
        made = getattr(configuration, config)(**sizes)
        made._attn_implementation = "eager"
        attention = getattr(module, name)(made)
        if not rotated:
            return attention, {"hidden_states": torch.randn(1, 5, 64)}
        cos = torch.linspace(0, 1, 5 * 16).view(5, 16)
        inputs: dict[str, Any] = {"hidden_states": torch.randn(5, 64), "cu_seqlens": torch.tensor([0, 5])}
        return attention, {**inputs, "position_embeddings": (cos, cos)}

    return make


ATTENTIONS = {
    "qwen3_vl": text("Qwen3VLTextAttention", "Qwen3VLTextConfig"),
    "qwen3_vl_moe": text("Qwen3VLMoeTextAttention", "Qwen3VLMoeTextConfig"),
    "glm_ocr": vision("GlmOcrVisionAttention", "GlmOcrVisionConfig", rotated=True),
    "internvl": vision("InternVLVisionAttention", "InternVLVisionConfig", rotated=False),
}
