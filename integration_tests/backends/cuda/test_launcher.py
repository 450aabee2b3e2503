"""Who starts kernels: launcher.c or Python, why, and what is said where neither can."""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from recording_driver import Op

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import cache, driver, launcher
from rmsnorm_patch.backends.cuda.launcher import in_python
from rmsnorm_patch.cli import environment
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput


def test_launcher_is_compiled_once_and_kept(recorded, compiled):
    assert (launcher.functions().kind, launcher.functions().reason) == ("c", "")
    (path,) = compiled.glob("*.artefact")
    before = path.stat().st_mtime_ns
    launcher.functions.cache_clear()
    assert launcher.functions().kind == "c"
    assert path.stat().st_mtime_ns == before


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs anonymous files")
def test_no_library_of_the_same_descriptor_is_taken_for_another(recorded, driver_path):
    """Another package's, and a second copy of the launcher: the linker knows both by the path of the descriptor."""
    content, before = launcher._shared_object(), launcher_libraries()
    for count in (1, 2):
        assert launcher._load(content)[0].__name__ == "new_kernel"
        assert len(launcher_libraries() - before) == count
    descriptor = os.memfd_create("another")
    with open(descriptor, "wb") as file:
        file.write(driver_path.read_bytes())
        file.flush()
        assert not hasattr(ctypes.CDLL(f"/proc/self/fd/{descriptor}"), "rp_functions")
    assert launcher._load(content)[0].__name__ == "new_kernel"


def launcher_libraries() -> set[str]:
    """The launchers that this process has mapped, by inode."""
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    return {words[4] for words in lines if len(words) > 5 and "rmsnorm_patch_launcher" in words[5]}


def test_without_a_compiler_ctypes_serves_with_one_warning(recorded, cache_dir, monkeypatch):
    monkeypatch.setattr(launcher, "compiler", lambda: [])
    with pytest.warns(RuntimeWarning, match="no C compiler") as seen:
        assert launcher.functions().kind == "python"
    launcher.functions()
    assert len(seen) == 1
    assert isinstance(Op(launcher.functions(), "rms_norm").call, in_python.PlainCall)


def test_compiler_failure_shows_its_message(recorded, cache_dir, monkeypatch):
    monkeypatch.setattr(launcher, "_FLAGS", ("-not-a-flag",))
    monkeypatch.setenv(launcher.VARIABLE, "c")
    with pytest.raises(KernelBuildError, match="not-a-flag"):
        launcher.functions()


def test_missing_driver_is_named(recorded, monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setenv(launcher.VARIABLE, "c")
    with pytest.raises(KernelBuildError, match="libcuda"):
        launcher.functions()
    driver.library.cache_clear()
    with pytest.raises(KernelBuildError, match="libno-such-driver"):
        driver.library()


def test_launcher_variable(recorded, monkeypatch):
    monkeypatch.setenv(launcher.VARIABLE, "python")
    assert launcher.functions().kind == "python"
    launcher.functions.cache_clear()
    monkeypatch.setenv(launcher.VARIABLE, "rust")
    with pytest.raises(UnsupportedInput, match="auto, c, python") as caught:
        launcher.functions()
    assert (caught.value.site, caught.value.got) == (launcher.VARIABLE, "'rust'")


def test_env_says_who_starts_kernels(recorded, monkeypatch):
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    ops.forget()
    assert environment.starting() == "started by launcher.c"
    with monkeypatch.context() as older:
        older.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
        ops.forget()
        why = "started from Python, a few microseconds more a call: torch before 2.10"
        assert environment.starting().startswith(why)
    monkeypatch.setenv(launcher.VARIABLE, "python")
    launcher.functions.cache_clear()
    ops.forget()
    assert environment.starting().endswith(f"{launcher.VARIABLE}=python")
    ops.forget()


def test_env_says_why_nobody_can_start_kernels(recorded, tmp_path, monkeypatch):
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    folder = tmp_path / "open"
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(folder))
    for forget in (cache.forget, launcher.functions.cache_clear, ops.forget):
        forget()
    assert str(folder) in environment.starting()
    for forget in (cache.forget, launcher.functions.cache_clear, ops.forget):
        forget()


def test_kernels_that_threads_build_at_once_have_numbers_of_their_own(monkeypatch):
    """A number that two of them had would start the one kernel for the other."""

    class Slow(list):
        def append(self, kernel):
            super().append(kernel)
            time.sleep(0.1)

    monkeypatch.setattr(in_python, "_kernels", Slow())
    monkeypatch.setattr(in_python, "_Kernel", lambda *_: SimpleNamespace())
    monkeypatch.setattr(driver, "library", lambda: Mock())
    new_kernel = in_python.functions()[0]
    with ThreadPoolExecutor(3) as pool:
        numbers = list(pool.map(new_kernel, range(3), range(3)))
    assert sorted(numbers) == [1, 2, 3]
    assert [in_python._kernels[number - 1].handle for number in numbers] == numbers
