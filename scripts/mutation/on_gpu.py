"""Runs CUDA kernels with faults: NVRTC compiles the changed source in memory, probes judge what the kernel gives.

Workers are forked from a process that has imported everything and touched no device. Each takes one fault after
another; one that dies of its fault (an illegal address), hangs in it or is spoiled by it is replaced. A fault whose
machine code is that of the right source, in every kernel that the probes compile, is told apart from one that only
passes them.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .faults import Fault

HANG = 25.0
"""Seconds of one probe after which a worker counts as hung."""
START = 120.0
"""Seconds that the first probe of a worker may take: it makes a context and loads libraries."""


def run(
    root: Path,
    wanted: Sequence[Fault],
    workers: int,
    gpus: Sequence[str],
    stop: float,
    note: Callable[[Fault, str], None],
    leave_out_red: bool = False,
) -> list[str]:
    """Ask every fault and note how it ended; the names of probes that were left out. gpus: as CUDA_VISIBLE_DEVICES
    names them; workers take turns at them. stop: monotonic time at which what still runs is killed. leave_out_red: go
    on without the probes that the right source fails, else SystemExit."""
    os.environ["RMSNORM_PATCH_CACHE_DIR"] = tempfile.mkdtemp(prefix="mutants-")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a look at the devices leaves the driver to the children
    sys.path[:0] = [str(root), str(root / "scripts")]
    import torch._dynamo  # noqa: F401
    from benchlib import kernel_cases  # noqa: F401

    from .compiled import LEFT_OUT
    from .probes import MAKERS

    try:
        failed = _baseline(_Team(root, sorted(MAKERS), min(workers, len(MAKERS)), gpus, stop))
        names = {probe.name for maker in MAKERS.values() for probe in maker()}
        if failed and not (leave_out_red and names > names & set(failed) == set(failed)):
            raise SystemExit("mutants: the right source fails probes")
        LEFT_OUT.update(failed)
        for fault, how in _Team(root, wanted, workers, gpus, stop).answers():
            print(f"{how}: {fault.named()}", flush=True)
            note(fault, how.partition(":")[0])
        return failed
    finally:
        shutil.rmtree(os.environ["RMSNORM_PATCH_CACHE_DIR"], ignore_errors=True)


def _baseline(team: _Team) -> list[str]:
    """Names of the probes that the right source fails, or that compile no kernel of their file."""
    began = time.monotonic()
    failed = [line for _, how in team.answers() if how != "survived" for line in how.splitlines()]
    took = time.monotonic() - began
    print(f"without a fault: {len(failed)} probes fail in {took:.0f} s", *failed, sep="\n  ", flush=True)
    return [line.partition(": ")[0] for line in failed]


class _Team:
    """Workers that share a list of work: faults, or kernel files whose right source is asked."""

    def __init__(self, root: Path, work: Sequence[Any], workers: int, gpus: Sequence[str], stop: float) -> None:
        self.root, self.waiting, self.stop = root, list(reversed(work)), stop
        self.places = [gpus[i % len(gpus)] if gpus else "" for i in range(workers)]
        self.team: dict[Any, _Worker] = {}

    def answers(self) -> Any:
        """(work, how it ended) as answers come."""
        try:
            while (self.waiting or self.team) and time.monotonic() < self.stop:
                while self.waiting and self.places:
                    worker = _Worker(self.root, self.places.pop())
                    self.team[worker.pipe] = worker
                    worker.give(self.waiting.pop())
                for pipe in multiprocessing.connection.wait(list(self.team), timeout=1.0):
                    yield from self._heard(self.team[pipe])
                for worker in list(self.team.values()):
                    if time.monotonic() > worker.patience:
                        yield worker.work, "hung"
                        self._end(worker)
        finally:
            for worker in list(self.team.values()):
                self._end(worker)

    def _heard(self, worker: _Worker) -> Any:
        try:
            how, sound = worker.pipe.recv()
        except (EOFError, OSError):
            how, sound = "crashed", False
        if how is None:  # it begins another probe
            worker.patience = time.monotonic() + HANG
            return
        if how:
            yield worker.work, how
        else:
            self.waiting.append(worker.work)
        if sound and self.waiting:
            worker.give(self.waiting.pop())
        else:
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        self.team.pop(worker.pipe).end()
        self.places.append(worker.gpu)


class _Worker:
    """A forked process and what it is at."""

    def __init__(self, root: Path, gpu: str) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(root, theirs, gpu), daemon=True)
        self.process.start()
        theirs.close()
        self.gpu, self.work = gpu, None
        self.patience = time.monotonic() + START

    def give(self, work: Any) -> None:
        self.work = work
        self.patience = max(self.patience, time.monotonic() + HANG)
        self.pipe.send(work)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(root: Path, pipe: Any, gpu: str) -> None:
    """Of a worker: answers each piece of work with how it ended, and whether the worker can take another."""
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from .compiled import Compiled

    compiled = Compiled(root, lambda: pipe.send((None, True)))
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            return
        pipe.send(compiled.right_source(work) if isinstance(work, str) else compiled.ended(work))
