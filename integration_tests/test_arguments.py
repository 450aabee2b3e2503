"""Each argument of the public functions, with values that are none: the class of the error, and words of it.

A typed error comes before the model runs, and leaves it as it was.
"""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import LlamaForCausalLM

import rmsnorm_patch
from rmsnorm_patch import NormSpec, NothingProved, UnsupportedInput, UnsupportedModel, VerificationFailed, ops, proof
from rmsnorm_patch.rewrite import observe

IDS = torch.arange(3, 9)[None]
MODULE = (UnsupportedModel, "model: got .*torch.nn.Module.*next: pass the model object itself")
FLAG = (UnsupportedInput, "True or False")
FILE = (UnsupportedInput, "the path of a file")
STRINGS = (UnsupportedInput, "a list of strings")
PATTERNS = (UnsupportedInput, "a sequence of fnmatch patterns")
BACKENDS = (UnsupportedInput, "'auto', 'reference', 'triton', 'cuda'")
COMPILED = (UnsupportedInput, "'model', 'joined'")
NO_INPUTS = (UnsupportedInput, "inputs: got .*a dict of tensors")
IDS_ONLY = (UnsupportedInput, "inputs: input_ids: got .*ids of int64 or int32")

Row = tuple[str, str, Any, tuple[type[Exception], str]]


def rows(function: str, argument: str, values: list[Any], error: tuple[type[Exception], str]) -> list[Row]:
    return [(function, argument, value, error) for value in values]


PROOF_OPTIONS: dict[str, tuple[list[Any], tuple[type[Exception], str]]] = {
    "sites": (["model.norm", 3, [3], b"model.norm"], STRINGS),
    "seed": ([None, 1.5, "0", True], (UnsupportedInput, "seed: got .*an integer")),
    "reference": (["fp32", None, 3], (UnsupportedInput, "'auto', 'wide', 'original'")),
    "greedy_tokens": ([-1, None, 1.5, "16"], (UnsupportedInput, "greedy_tokens: got .*an integer of at least 0")),
    "strict": ([None, 1, "yes"], FLAG),
    "record": ([3, True, "", b"file", "a\0b"], FILE),
    "compare": ([3, True, "", "a\0b"], FILE),
    "save_failure": ([3, "", object(), "a\0b"], FILE),
    "raise_on_failure": ([None, 0], FLAG),
    "space": ([-1, None, 1e9], (UnsupportedInput, "space: got .*an integer of at least 0")),
    "source": ([3, None], (UnsupportedInput, "a string")),
    "arguments": (["--strict", 3, [3]], STRINGS),
    "progress": ([3, "print"], (UnsupportedInput, "a function of one string")),
}
INPUTS: list[tuple[list[Any], tuple[type[Exception], str]]] = [
    ([3, "text", [3], object(), {"input_ids": [1, 2]}], NO_INPUTS),
    ([[]], (UnsupportedInput, "inputs: got an empty list")),
    ([IDS.float(), {"input_ids": IDS.float()}, IDS.bool(), torch.tensor(3), IDS[None]], IDS_ONLY),
    ([IDS.to("meta")], (UnsupportedInput, "inputs: input_ids: got a tensor on the meta device")),
    ([IDS.to_sparse()], (UnsupportedInput, "inputs: input_ids: got a sparse_coo tensor")),
    ([IDS + 100_000, IDS - 4], (UnsupportedInput, "inputs: input_ids: got the id .*rows of the model's embedding")),
    ([IDS[:, :0], {"input_ids": IDS[:, :0]}, [IDS, IDS[:0]]], (NothingProved, "a tensor of shape")),
    (
        [{"words": IDS}, {"input_ids": IDS, "attention_mask": torch.ones(1, 1, 1, 1, 2)}],
        (UnsupportedInput, "inputs: got inputs on which the unpatched model raises"),
    ),
]
HELD = nn.Linear(2, 2)
NO_MODULES = [None, 3, "model", nn.Linear, [nn.Linear(2, 2)], {"model": 1}, weakref.proxy(HELD)]
TAKE_MODELS = (
    "plan", "apply", "revert", "status", "warmup", "patched", "verify", "record_logits", "compare_logits",
)  # fmt: skip
PLANS = ("plan", "apply", "patched")
TABLE: list[Row] = [
    *(row for name in TAKE_MODELS for row in rows(name, "model", NO_MODULES, MODULE)),
    *(
        row
        for name in PLANS
        for option in ("include", "exclude")
        for row in rows(name, option, ["model.*", 5, [None], [b"x"], object()], PATTERNS)
    ),
    *(row for name in PLANS for row in rows(name, "compiled", ["op", None, 3, ["joined"], True], COMPILED)),
    *(row for name in PLANS for row in rows(name, "backend", ["rocm", None, 3, ["auto"], b"auto"], BACKENDS)),
    *rows("plan", "include", [["no.such.norm"]], (UnsupportedModel, "no.such.norm")),
    *rows("warmup", "dtype", ["int3", "nn", torch.int8, 5, [torch.float16]], (UnsupportedInput, "dtype: got")),
    *(
        row
        for name in ("verify", "apply")
        for option, (values, error) in PROOF_OPTIONS.items()
        for row in rows(name, option, values, error)
    ),
    *rows("verify", "no_such_option", [1], (UnsupportedInput, r"verify\(no_such_option=...\): got an unknown option")),
    *rows("apply", "no_such_option", [1], (UnsupportedInput, r"apply\(no_such_option=...\): got an unknown option")),
    *(
        row
        for name in ("verify", "record_logits")
        for values, error in INPUTS
        for row in rows(name, "inputs", values, error)
    ),
    *(row for values, error in INPUTS for row in rows("apply", "verify", values, error)),
    *(row for name in ("record_logits", "compare_logits") for row in rows(name, "path", [3, None, ""], FILE)),
    *rows("compare_logits", "path", ["/no/such/file"], (UnsupportedInput, "no such file")),
    *rows("verify", "compare", ["/no/such/file"], (UnsupportedInput, "no such file")),
    *rows("verify", "compare", ["/"], (UnsupportedInput, "a folder")),
    *rows("verify", "record", ["/proc/no/such/file"], (UnsupportedInput, "cannot be written")),
    *rows("NormSpec", "round_before_weight", ["up", None], (ValueError, "round_before_weight: got .*allowed")),
    *rows("NormSpec", "width", [0, -1, 1.5, "64"], (ValueError, "width: got .*a positive number of columns")),
    *rows("NormSpec", "group", [0, 2.0], (ValueError, "group: got .*a positive number of columns")),
    *rows("NormSpec", "eps", ["1e-6", -1.0, float("nan"), 1j], (ValueError, "eps: got .*a number of at least 0")),
    *rows("NormSpec", "has_weight", [None, 1], (ValueError, "has_weight: got .*True, False")),
    *rows("bind", "op", ["layer_norm", 3], (ValueError, "op: got .*'rms_norm'")),
    *rows("bind", "backend", ["rocm", None, 3], (ValueError, "backend: got .*'auto'")),
    *rows("bind", "spec", [None, "llama", 1e-6], (ValueError, "spec: got .*a NormSpec")),
]  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(rmsnorm_patch, name) for name in ("plan", "apply", "verify", "revert", "status", "warmup")},
    "patched": lambda **named: rmsnorm_patch.patched(**named).__enter__(),
    "record_logits": proof.record_logits,
    "compare_logits": proof.compare_logits,
    "NormSpec": NormSpec,
    "bind": ops.bind,
}
GOOD: dict[str, dict[str, Any]] = {
    "verify": {"inputs": IDS},
    "record_logits": {"inputs": IDS, "path": "recording"},
    "compare_logits": {"path": "recording"},
    "bind": {"op": "rms_norm", "spec": NormSpec()},
}
WITHOUT_MODEL = ("NormSpec", "bind")


@pytest.fixture(scope="module")
def models() -> dict[bool, nn.Module]:
    """patched -> a model."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)).eval()
    patched = copy.deepcopy(plain)
    rmsnorm_patch.apply(patched)
    return {False: plain, True: patched}


def named(row: Row) -> str:
    function, argument, value, _ = row
    shown = f"{tuple(value.shape)}-{value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
    shown = re.sub(" at 0x[0-9a-f]+", "", shown)  # processes that share the tests must name them alike
    return f"{function}-{argument}-{shown[:40]}"


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_what_is_no_argument(row: Row, models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, argument, value, (error, words) = row
    monkeypatch.chdir(tmp_path)
    arguments = {**GOOD.get(function, {}), argument: value}
    needs_patch = function in ("verify", "status", "warmup")
    if function not in WITHOUT_MODEL:
        arguments.setdefault("model", models[needs_patch])
    if function == "apply" and argument in PROOF_OPTIONS:
        arguments["verify"] = IDS
    with pytest.raises(error, match=f"(?s){words}"):
        FUNCTIONS[function](**arguments)
    assert [
        type(module).__name__ for module in models[False].modules() if hasattr(type(module), "_rmsnorm_patch_role")
    ] == []
    assert not list(tmp_path.iterdir())


def test_every_option_of_a_proof_stands_in_the_table() -> None:
    options = list(inspect.signature(proof.verify).parameters)[2:]
    assert set(options) == set(PROOF_OPTIONS)


@pytest.mark.parametrize("verify", [None, False])
def test_no_proof_is_asked_for(models, verify: bool | None) -> None:
    report = rmsnorm_patch.apply(copy.deepcopy(models[False]), verify=verify)
    assert report.proof is None


def test_inputs_that_the_model_refuses_leave_it_as_it_was(models) -> None:
    model = copy.deepcopy(models[False])
    with pytest.raises(UnsupportedInput, match="the unpatched model raises"):
        rmsnorm_patch.apply(model, verify={"input_ids": IDS, "no_such": IDS})
    with pytest.raises(UnsupportedModel, match="not patched"):
        rmsnorm_patch.status(model)


def test_a_recording_of_another_model_is_refused_before_anything_runs(models, tmp_path: Path) -> None:
    other = copy.deepcopy(models[False])
    with torch.no_grad():
        other.model.norm.weight.mul_(2.0)
    proof.record_logits(other, IDS, tmp_path / "recording")
    model = copy.deepcopy(models[True])
    told: list[str] = []
    with pytest.raises(UnsupportedModel, match=r"weights_digest .*load the checkpoint and dtype that were recorded"):
        rmsnorm_patch.verify(model, IDS, compare=tmp_path / "recording", progress=told.append)
    assert not told


def test_a_recording_of_this_model_is_taken(models, tmp_path: Path) -> None:
    proof.record_logits(models[False], IDS, tmp_path / "recording")
    found = rmsnorm_patch.verify(models[True], IDS, compare=tmp_path / "recording", greedy_tokens=0)
    assert found.passed


@pytest.fixture
def triton_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("RMSNORM_PATCH_BACKEND", "triton")


@pytest.mark.usefixtures("triton_by_variable")
def test_the_variable_brings_the_interpreter_in(models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = copy.deepcopy(models[False])
    report = rmsnorm_patch.apply(model)
    assert report.backend == "triton"
    assert "backend triton" in str(report.plan)
    ran = set()
    with torch.no_grad(), observe.observing(lambda event: ran.add(event.backend)):
        model(IDS)
    assert ran == {"triton"}
    counts = rmsnorm_patch.status(model).counts()
    assert (counts["reference"], counts["fallen_back"]) == (0, 0)
    assert ops.bind_rms_norm(NormSpec()).backend_for(torch.randn(2, 8)) == "triton"
    rmsnorm_patch.revert(model)


@pytest.mark.usefixtures("triton_by_variable")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_the_variable_without_the_interpreter_is_an_error(models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = copy.deepcopy(models[False])
    said = r"RMSNORM_PATCH_BACKEND='triton': .*next: set TRITON_INTERPRET=1 .*or unset RMSNORM_PATCH_BACKEND"
    for function in (rmsnorm_patch.plan, rmsnorm_patch.apply):
        with pytest.raises(UnsupportedInput, match=said):
            function(model)
    assert rmsnorm_patch.plan(model, backend="reference").backend == "reference"


def test_an_error_of_a_kind_says_where_what_and_next() -> None:
    """Every error of the table's functions is of the package's own classes, or a ValueError that names its argument."""
    own = {error for _, _, _, (error, _) in TABLE}
    assert own <= {UnsupportedInput, UnsupportedModel, NothingProved, ValueError}
    assert issubclass(NothingProved, VerificationFailed)
