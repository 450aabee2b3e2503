"""Faults of CUDA kernels that need no GPU: those that do not compile, and those that change no probed machine code.

The probes are run once on the CPU, over a driver that starts nothing, to learn which kernels they compile on a device
of `CAPABILITY`. Each fault is then compiled into these kernels, until one differs.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from .faults import Fault

CAPABILITY = (9, 0)
NAME = "NVIDIA H200"


def run(root: Path, wanted: Sequence[Fault], workers: int, stop: float, note: Callable[[Fault, str], None]) -> None:
    """Note the faults that end without a GPU, those of the fewest kernels first. stop: monotonic time of the end."""
    os.environ["RMSNORM_PATCH_CACHE_DIR"] = tempfile.mkdtemp(prefix="mutants-")
    try:
        kernels = Kernels(root)
        print(f"probes compile {sum(map(len, kernels.builds.values()))} kernels", flush=True)
        ordered = sorted(wanted, key=lambda fault: kernels.count(fault.file))
        with multiprocessing.get_context("fork").Pool(workers, _take, (kernels,)) as pool:
            for number, (fault, how) in enumerate(pool.imap_unordered(_ended, ordered), 1):
                print(f"{number}/{len(wanted)} {how or 'other code'}: {fault.named()}", flush=True)
                if how:
                    note(fault, how)
                if time.monotonic() > stop:
                    break
    finally:
        shutil.rmtree(os.environ["RMSNORM_PATCH_CACHE_DIR"], ignore_errors=True)


_taken: list[Kernels] = []


def _take(kernels: Kernels) -> None:
    _taken[:] = [kernels]


def _ended(fault: Fault) -> tuple[Fault, str]:
    return fault, _taken[0].ended(fault)


class Kernels:
    """The kernels that the probes compile, by their file."""

    def __init__(self, root: Path) -> None:
        from .compiled import Compiled

        self.compiled = Compiled(root, lambda: None)
        self.builds = builds_of_probes(self.compiled)
        self._right: dict[Any, str] = {}
        self._included = {file: _included(file, self.compiled.texts) for file in self.builds}

    def count(self, file: str) -> int:
        """Kernels that a fault of a file can change."""
        return sum(len(self.builds[kernel]) for kernel in self._asked(file))

    def ended(self, fault: Fault) -> str:
        """ "does not compile" where the first kernel that is not as before cannot be compiled, "same code" where every
        one is as before, else ""."""
        for file in self._asked(fault.file):
            source = None
            for build in self.builds[file]:
                right = self._right.get(build) or self._right.setdefault(build, self._code(build, self._source(file)))
                try:
                    source = source or self._source(file, fault)
                    code = self._code(build, source)
                except Exception as error:
                    return "does not compile" if "NVRTC_ERROR" in str(error) else ""
                if code != right:
                    return ""
        return "same code"

    def _asked(self, file: str) -> list[str]:
        return [kernel for kernel in sorted(self.builds) if Path(file).name in self._included[kernel]]

    def _source(self, file: str, fault: Fault | None = None) -> Any:
        self.compiled.fault = fault
        return self.compiled.source_of(file)

    def _code(self, build: Any, source: Any) -> str:
        from rmsnorm_patch.backends.cuda import nvrtc

        options = (f"--gpu-architecture={build.architecture()}", *build.options())
        code = nvrtc.compile_source(build.config.source, source.text, source.headers, options)
        return hashlib.sha256(code).hexdigest()


def builds_of_probes(compiled: Any) -> dict[str, list[Any]]:
    """Every `jit.Build` of the probes by its kernel file, in the order in which they ask for them."""
    from .compiled import probes
    from .probes import MAKERS

    found: dict[str, dict[Any, None]] = {file: {} for file in sorted(MAKERS)}
    with _pretended_device():
        for file in sorted(MAKERS):
            for probe in probes(file):
                compiled.inherited = lambda build: b""
                with suppress(NotImplementedError):  # judging, of a dtype that the CPU has no such function for
                    compiled.wrong(probe, None)  # says that the results are wrong: nothing has written them
                for build in compiled.last:
                    found[build.config.source][build] = None
                assert any(build.config.source == file for build in compiled.last), f"{probe.name}: no kernel of {file}"
    return {file: list(builds) for file, builds in found.items()}


def _included(file: str, texts: dict[str, str]) -> set[str]:
    """A kernel file and the headers that it takes in."""
    found = {file}
    for name in re.findall(r'#include "(.*?)"', texts[file]):
        found |= _included(name, texts)
    return found


@contextmanager
def _pretended_device() -> Iterator[None]:
    """Tensors of "cuda" lie on the CPU, say otherwise, and kernels are loaded and started by nobody."""
    import torch
    from torch.overrides import TorchFunctionMode

    from rmsnorm_patch.backends.cuda import driver, launcher
    from rmsnorm_patch.ops import dispatch

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    generator = torch.Generator
    functions = launcher.Functions(
        lambda *_: 1, lambda *_: 0, lambda _, __, slow, *more: (None, slow), lambda *_: 0, "python", "no device"
    )
    replaced: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "is_cuda", property(lambda _: True)),
        (torch.Tensor, "get_device", lambda _: 0),
        (torch.cuda, "get_device_capability", lambda *_: CAPABILITY),
        (torch.cuda, "get_device_name", lambda *_: NAME),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "_sleep", lambda *_: None),
        (torch, "Generator", lambda *_: generator("cpu")),
        (torch._C, "_cuda_getCurrentRawStream", lambda *_: 0),
        (dispatch, "available", lambda *_: (True, "")),
        (driver, "load", lambda *_: 1),
        (driver, "primary_context", lambda *_: 1),
        (launcher, "functions", lambda: functions),
        (launcher, "python_functions", lambda _: functions),
    ]
    with ExitStack() as stack:
        for where, name, what in replaced:
            stack.enter_context(mock.patch.object(where, name, what, create=True))
        stack.enter_context(OnCpu())
        yield
