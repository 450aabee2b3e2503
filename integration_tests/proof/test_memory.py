"""What a proof takes is said before it starts, within the limit of the container."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from proof_models import build, prompts

from rmsnorm_patch import UnsupportedInput, apply, verify
from rmsnorm_patch.proof import memory

CPU, GIB = torch.device("cpu"), 1 << 30


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of control groups, this process in /pods/one, on a host with 64 GiB available."""
    host, own = tmp_path / "meminfo", tmp_path / "own"
    host.write_text("MemTotal: 99999999 kB\nMemAvailable: 67108864 kB\n")
    own.write_text("0::/pods/one\n")
    root = tmp_path / "cgroup"
    (root / "pods/one").mkdir(parents=True)
    for name, path in (("_HOST", host), ("_OWN_GROUP", own), ("_GROUPS", root)):
        monkeypatch.setattr(memory, name, path)
    return root


def limit(folder: Path, most: str, used: int, inactive: int = 0) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


def test_a_host_without_limits(container: Path) -> None:
    limit(container / "pods/one", "max", 3 * GIB)
    assert memory.free(CPU) == 64 * GIB


def test_the_containers_limit_counts(container: Path) -> None:
    limit(container / "pods/one", str(4 * GIB), 3 * GIB, inactive=GIB // 2)
    assert memory.free(CPU) == GIB + GIB // 2


def test_the_tightest_of_nested_groups_counts(container: Path) -> None:
    limit(container / "pods/one", "max", GIB)
    limit(container / "pods", str(2 * GIB), GIB)
    assert memory.free(CPU) == GIB


def test_version_1(container: Path) -> None:
    memory._OWN_GROUP.write_text("5:cpu,cpuacct:/a\n4:memory:/pods/one\n")
    group = container / "memory/pods/one"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    (group / "memory.stat").write_text("total_inactive_file 4096\n")
    assert memory.free(CPU) == GIB + 4096


def test_inside_a_container_its_group_is_the_root(container: Path) -> None:
    """With a namespace of its own, the path of the group outside does not exist inside."""
    memory._OWN_GROUP.write_text("0::/../../kubepods/abc\n")
    limit(container, str(GIB), 0)
    assert memory.free(CPU) == GIB


def test_nothing_known(container: Path) -> None:
    memory._HOST.unlink()
    memory._OWN_GROUP.unlink()
    assert memory.free(CPU) is None


def test_it_is_said_first_and_steps_are_counted() -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    said: list[str] = []
    verify(model, prompts(), greedy_tokens=2, progress=said.append)
    assert said[0].startswith("memory: about ")
    assert "GiB on cpu (free " in said[0]
    assert [line.split()[0] for line in said[1:]] == [f"{n}/10" for n in range(1, 11)]


def test_it_is_logged_where_nobody_asks(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    with caplog.at_level("INFO", logger="rmsnorm_patch"):
        verify(model, prompts(), greedy_tokens=0)
    assert any("memory: about" in record.getMessage() for record in caplog.records)


def test_what_does_not_fit_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)
    apply(model)
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    said: list[str] = []
    with pytest.raises(UnsupportedInput, match="fewer or shorter inputs"):
        verify(model, prompts(), progress=said.append)
    assert len(said) == 1


def test_the_estimate_covers_what_is_kept() -> None:
    """Three sets of logits and the norms' outputs."""
    model = build("llama", torch.bfloat16)
    apply(model)
    inputs = prompts(4, 60)
    tapes = 4 * 60 * 7 * 64 * 2
    kept = 4 * 60 * 128 * (2 + 2 + 4) + tapes
    from rmsnorm_patch.proof.runs import Run

    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    found = memory.of_proof(model, [Run("forward 0", inputs)], norms, 1 << 30)[CPU]
    assert kept <= found <= 2 * kept + 4096
