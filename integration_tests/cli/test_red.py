"""A wrong kernel or hand-over under the command line: exit status 1, what differs, and the command that repeats it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmsnorm_patch import ops
from rmsnorm_patch.cli.output import FAILED, NOTHING_PROVED
from rmsnorm_patch.numerics.reference import fused_add_rms_norm, rms_norm
from rmsnorm_patch.rewrite import norms


@pytest.fixture
def _wrong_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that run, with a hundred times the model's eps."""

    def call(self: ops.Bound, *operands: torch.Tensor) -> object:
        function = rms_norm if self.op == "rms_norm" else fused_add_rms_norm
        return function(*operands[:-1], self.spec, operands[-1] * 100)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops.Bound, "__call__", call)
    monkeypatch.setattr(ops.Bound, "backend_for", lambda self, x, weight=None, residual=None: "triton")


@pytest.fixture
def _stale_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each norm takes the rows of the position before."""
    real = norms.take

    def stale(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        taken = real(norm, x)
        return None if taken is None else taken.roll(1, dims=1) * 0.5

    monkeypatch.setattr(norms, "take", stale)


@pytest.mark.usefixtures("_wrong_eps")
def test_the_command_that_a_red_proof_names_is_red_again(command, tiny_llama: Path) -> None:
    given = ("--backend", "triton", "--device", "cpu", "--prompt", "Return 'a b'", "--exclude", "*.0.input_layernorm")
    ended = command("verify", tiny_llama, *given, "--max-new-tokens", 2, "--json")
    assert ended.status == FAILED
    document = ended.document
    assert document["error"]["type"] == "VerificationFailed"
    proof = document["proof"]
    assert proof["passed"] is False
    red = proof["red_site"]
    assert red in {site["path"] for site in proof["sites"]}
    assert ended.stderr.rstrip().endswith(f"again with: {proof['command']}")
    words = shlex.split(proof["command"])
    assert (words[0], words[words.index("--site") + 1]) == ("rmsnorm-patch", red)
    again = command(*words[1:], "--json")
    assert again.status == FAILED
    (repeated,) = [site for site in again.document["proof"]["sites"] if site["measurements"]]
    assert repeated == next(site for site in proof["sites"] if site["path"] == red)


@pytest.mark.usefixtures("_stale_hand_over")
def test_generate_says_that_the_tokens_differ(command, tiny_llama: Path) -> None:
    arguments = ("generate", tiny_llama, "--device", "cpu", "--prompt", "Return the ", "--max-new-tokens", 12)
    ended = command(*arguments, "--compare", "--json")
    assert (ended.status, ended.document["equal_to_stock"]) == (FAILED, False)
    shown = command(*arguments, "--compare")
    assert shown.status == FAILED
    assert "equal to stock: NO" in shown.stderr


@pytest.mark.usefixtures("_stale_hand_over")
def test_the_demo_is_red(command, tiny_llama: Path) -> None:
    ended = command("demo", tiny_llama, "--device", "cpu", "--rounds", 1, "--max-new-tokens", 8, "--json")
    (story,) = ended.document["checkpoints"]
    assert (ended.status, story["passed"], story["same_text"]) == (FAILED, False, False)
    assert story["restored"] is True


@pytest.fixture
def empty_answers(tiny_llama: Path, tmp_path: Path) -> Path:
    """The checkpoint with a weight that is NaN: its logits are, stock and patched."""
    folder = tmp_path / "nan"
    shutil.copytree(tiny_llama, folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_nothing_proved_has_a_status_of_its_own(command, empty_answers: Path) -> None:
    given = ("--device", "cpu", "--prompt", "Return", "--max-new-tokens", 2)
    ended = command("verify", empty_answers, *given, "--json")
    assert (ended.status, ended.document["exit_status"]) == (NOTHING_PROVED, NOTHING_PROVED)
    assert ended.document["error"]["type"] == "NothingProved"
    assert ended.document["proof"]["verdict"] == "nothing proved"
    assert command("demo", empty_answers, *given, "--rounds", 1).status == NOTHING_PROVED
