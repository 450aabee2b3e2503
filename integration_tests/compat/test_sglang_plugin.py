"""SGLang's plugin without an engine: what its hooks serve, and what they leave to SGLang's functions."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rmsnorm_patch import UnsupportedInput
from rmsnorm_patch.backends.rule_table import tomllib
from rmsnorm_patch.compat import sglang_plugin
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.ops import dispatch
from rmsnorm_patch.scan.probe import same_bits

COLUMNS = 96
NAMES = tuple(sglang_plugin.FUNCTIONS)
Function = Callable[..., torch.Tensor | None]


class Own:
    """SGLang's function of this name by its arithmetic, times `factor`; counts its calls."""

    def __init__(self, name: str, factor: float = 1.0) -> None:
        self.spec = sglang_plugin.FUNCTIONS[name][1]
        self.adds = "add" in name
        self.factor = factor
        self.calls = 0

    def __call__(self, *given: torch.Tensor | float | None) -> torch.Tensor | None:
        self.calls += 1
        if not self.adds:
            x, weight, eps = given[:3]
            normed = self.factor * reference.rms_norm(x, weight, self.spec, eps)
            return normed if len(given) < 4 or given[3] is None else given[3].copy_(normed)
        x, residual, weight, eps = given[:4]
        normed, total = reference.fused_add_rms_norm(x, residual, weight, self.spec, eps)
        residual.copy_(total)
        x.copy_(self.factor * normed)
        return None


@pytest.fixture(autouse=True)
def nothing_tried() -> Iterator[None]:
    sglang_plugin._trusted.clear()
    yield
    sglang_plugin._trusted.clear()


def hook_of(name: str, own: Own) -> Function:
    """What stands in SGLang's module once the hook is in place."""
    make = sglang_plugin.hook_of_add if own.adds else sglang_plugin.hook_of_norm
    return partial(make(name, own.spec), own)


def operands(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randn(5, COLUMNS, generator=generator).to(dtype) for _ in range(1 + ("add" in name))]
    return (*rows, torch.rand(COLUMNS, generator=generator).to(dtype))


def results(function: Function, tensors: tuple[torch.Tensor, ...], *more: object) -> list[torch.Tensor]:
    """(normed,) or (normed, sum), wherever the function leaves them."""
    given = [tensor.clone() for tensor in tensors]
    returned = function(*given, 1e-5, *more)
    return given[:2] if returned is None else [returned]


def agree(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_agrees_is_stood_in_for(name: str, caplog: pytest.LogCaptureFixture) -> None:
    own, tensors = Own(name), operands(name)
    with caplog.at_level(logging.INFO):
        given = results(hook_of(name, own), tensors)
    assert f"{name} of {COLUMNS} columns is served" in caplog.text
    assert agree(given, results(Own(name), tensors))
    assert own.calls == len(sglang_plugin.ROWS)  # the trial's
    results(hook_of(name, own), tensors)
    assert own.calls == len(sglang_plugin.ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_computes_otherwise_stays(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Another release's arithmetic, for example."""
    own, tensors = Own(name, factor=1.5), operands(name)
    for _ in range(2):
        assert agree(results(hook_of(name, own), tensors), results(Own(name, factor=1.5), tensors))
    assert caplog.text.count("the two disagree on this device") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_does_not_run_costs_a_warning(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no image for this device")

    monkeypatch.setattr(sglang_plugin.ops, "bind", lambda *_: broken)
    own, tensors = Own(name), operands(name)
    assert agree(results(hook_of(name, own), tensors), results(Own(name), tensors))
    assert "no image for this device" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_holds_for_the_backend_that_it_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call under another value of the variable binds another op, which is tried first."""
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    own, tensors = Own(name), operands(name)
    results(hook_of(name, own), tensors)
    trials = own.calls
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results(hook_of(name, own), tensors)
    results(hook_of(name, own), tensors)
    assert own.calls == 2 * trials
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "cuda")  # which does not run here
    assert agree(results(hook_of(name, own), tensors), results(Own(name), tensors))
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE)
    calls = own.calls
    results(hook_of(name, own), tensors)
    assert own.calls == calls


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_no_kernel_should_take_are_sglang_s(name: str) -> None:
    tensors = operands(name)
    *rows, weight = tensors
    hooked = Own(name)
    results(hook_of(name, hooked), tensors)
    others = [
        (*(row.float() for row in rows), weight.float()),
        (*rows, weight.float()),
        (*(row[:0] for row in rows), weight),
    ]
    if hooked.adds:
        others.append((rows[0], rows[1].float(), weight))
    for given in others:
        before = hooked.calls
        results(hook_of(name, hooked), given)
        assert hooked.calls == before + 1, [(tensor.shape, tensor.dtype) for tensor in given]


def test_a_given_result_is_written_by_sglang() -> None:
    own, (x, weight) = Own("rmsnorm"), operands("rmsnorm")
    out = torch.empty_like(x)
    assert hook_of("rmsnorm", own)(x, weight, 1e-5, out) is out
    assert own.calls == 1
    assert agree([out], results(Own("rmsnorm"), (x, weight)))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_compiler_traces_is_sglang_s(name: str) -> None:
    own, tensors = Own(name), operands(name)
    hook = hook_of(name, own)
    results(hook, tensors)
    own.factor = 0.0  # what is traced gives zeros, and what is served does not
    assert results(hook, tensors)[0].any()
    assert not results(torch.compile(hook, backend="eager", fullgraph=True), tensors)[0].any()


def test_the_entry_point_is_what_sglang_calls(repository: Path) -> None:
    """SGLang loads each entry point of the group, and calls it without an argument."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (named,) = project["entry-points"][sglang_plugin.GROUP].items()
    assert metadata.EntryPoint(*named, sglang_plugin.GROUP).load() is sglang_plugin.register
    inspect.signature(sglang_plugin.register).bind()


@pytest.mark.parametrize(
    ("value", "said"),
    [("off", "RMSNORM_PATCH_SGLANG=off"), ("auto", "no NVIDIA GPU"), ("of", "UnsupportedInput: RMSNORM_PATCH_SGLANG")],
)
def test_what_is_not_served_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str, said: str
) -> None:
    if value == "auto" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv(sglang_plugin.VARIABLE, value)
    with caplog.at_level(logging.INFO, logger=sglang_plugin.logger.name):
        assert sglang_plugin.register() is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"rmsnorm_patch: SGLang keeps its own norms: {said}")
    assert "sglang" not in sys.modules


@pytest.fixture
def sglang_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `describe` looks at of an installed SGLang: its metadata, and the file that has the hooks."""
    info, plugins = tmp_path / "sglang-0.5.23.dist-info", tmp_path / "sglang" / "srt" / "plugins"
    for folder in (info, plugins):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n")
    (tmp_path / "sglang" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (plugins / "hook_registry.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return plugins


@pytest.mark.usefixtures("sglang_installed")
@pytest.mark.parametrize(
    ("value", "gpu", "plugins", "said"),
    [
        ("auto", True, None, ""),
        ("auto", True, "others, rmsnorm_patch", ""),
        ("auto", True, "others", "SGLANG_PLUGINS does not name rmsnorm_patch"),
        ("auto", False, None, "no NVIDIA GPU"),
        ("off", True, None, "RMSNORM_PATCH_SGLANG=off"),
        ("maybe", True, None, "RMSNORM_PATCH_SGLANG: got 'maybe'"),
    ],
)
def test_an_installation_is_described(
    monkeypatch: pytest.MonkeyPatch, value: str, gpu: bool, plugins: str | None, said: str
) -> None:
    monkeypatch.setenv(sglang_plugin.VARIABLE, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if gpu else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    found = sglang_plugin.describe()
    assert (found.version, found.served) == ("0.5.23", not said)
    assert said in found.reason
    assert "sglang" not in sys.modules


def test_a_release_without_hooks_is_described(sglang_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (sglang_installed / "hook_registry.py").unlink()
    assert sglang_plugin.describe() == sglang_plugin.Outlook("0.5.23", False, "SGLang 0.5.23 has no hooks for plugins")


def test_no_sglang_is_described() -> None:
    assert sglang_plugin.describe() == sglang_plugin.Outlook(None, False, "SGLang is not installed")


def test_a_value_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sglang_plugin.VARIABLE, "of")
    with pytest.raises(UnsupportedInput, match="'auto', 'off' or unset"):
        sglang_plugin.read()
    monkeypatch.setenv(sglang_plugin.VARIABLE, "OFF")
    assert sglang_plugin.read() == "off"
