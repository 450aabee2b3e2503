"""What the functions of the package do with arguments that are odd: accept what is plain, name the next step else."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rmsnorm_patch
from rmsnorm_patch import UnsupportedInput, UnsupportedModel, api, apply, patched, plan, revert, rewrite, verify, warmup
from rmsnorm_patch.backends.triton import loader as triton_loader

IDS = torch.arange(3, 9)[None]


@pytest.fixture
def model(small_model) -> Any:
    return small_model("llama")


def test_a_model_is_scanned_once(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """`apply` carries out what its plan was made of: norms and layers are read once, and applied again not at all."""
    counts: Counter[str] = Counter()

    def counted(owner: ModuleType, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **named: Any) -> Any:
            counts[name] += 1
            return real(*args, **named)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((api, "scan_norms"), (api, "layout"), (rewrite, "layout")):
        counted(owner, name)
    apply(model)
    assert counts == {"scan_norms": 1, "layout": 1}
    apply(model)
    assert counts == {"scan_norms": 1, "layout": 1}


def test_no_pattern_is_no_pattern(model) -> None:
    assert plan(model, include=None, exclude=None) == plan(model)
    with patched(model, include=None, exclude=None) as report:
        assert len(report.norms) == 5


@pytest.mark.parametrize("kind", [list, tuple, iter, set, lambda patterns: (p for p in patterns)])
def test_patterns_in_any_container(model, kind: Callable[[list[str]], Any]) -> None:
    """An iterator too, which can be read once: forgotten patterns would mean all norms."""
    report = apply(model, include=kind(["model.norm"]))
    assert report.norms == ("model.norm",)
    assert report.plan.include == ("model.norm",)


@pytest.mark.parametrize("patterns", ["model.*", 5, [None], [b"model.*"], object()])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_what_is_no_list_of_patterns(model, option: str, patterns: Any) -> None:
    with pytest.raises(UnsupportedInput, match=rf"{option}: got .*next: pass {option}=\['model"):
        apply(model, **{option: patterns})


def test_dtypes_by_name(model) -> None:
    apply(model)
    assert warmup(model, "bfloat16") == warmup(model, torch.bfloat16) == warmup(model, "torch.float16") == ()
    for dtype in ("int3", "nn", torch.int8, 5, "float64x"):
        with pytest.raises(UnsupportedInput, match=r"dtype: got .*torch\.bfloat16"):
            warmup(model, dtype)


def test_a_model_without_weights() -> None:
    """Planned and patched; a proof would have nothing to run."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))
    assert len(apply(empty).norms) == 5
    with pytest.raises(UnsupportedModel, match=r"meta device.*next: load the weights"):
        verify(empty, IDS)
    revert(empty)
    with pytest.raises(UnsupportedModel, match="meta device"):
        apply(empty, verify=IDS)
    assert "rmsnorm_patch" not in type(empty.model.norm).__module__


@pytest.mark.parametrize(
    "options",
    [{"greedy_tokens": -1}, {"greedy_tokens": 1.5}, {"greedy_tokens": None}, {"seed": None}, {"seed": "0"}],
)
def test_numbers_of_a_proof(model, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UnsupportedInput, match=f"{name}: got .*an integer"):
        apply(model, verify=IDS, **options)
    assert rmsnorm_patch.plan(model).counts()["norm/fuse"] == 5


def test_triton_that_is_not_installed(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step mends the cause: to move the model would not."""
    triton_loader.triton_missing.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedInput, match=r"triton is not installed.*next: install triton \(pip install triton\)"):
        apply(model, backend="triton")
    monkeypatch.undo()
    triton_loader.triton_missing.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedInput, match=r"next: set TRITON_INTERPRET=1 .* or move the model to a GPU"):
        apply(model, backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_cuda_where_there_is_none(model) -> None:
    with pytest.raises(UnsupportedInput, match=r"torch sees no CUDA device.*next: run it where torch, an NVIDIA GPU"):
        apply(model, backend="cuda")
