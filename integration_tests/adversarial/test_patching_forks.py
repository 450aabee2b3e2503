"""Children forked while another thread, or the same one, is changing a model (real threads, real processes).

The thread that was changing it is not in the child: nothing there may wait for it, nor take what it left for a model
that is patched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from types import MethodType

import pytest

import rmsnorm_patch
from rmsnorm_patch import locks
from rmsnorm_patch.backends.triton import loader as triton_loader
from rmsnorm_patch.patch_state import derives_from_patched
from rmsnorm_patch.rewrite import LOCK, instance_forward, layers

SECONDS = 300
"""A guard against a hang: a child has waited for busy cores."""

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
]


def in_child(check: Callable[[], None]) -> int:
    """Exit status of a child that runs `check`: 0 where it came to its end, negative where it had to be killed."""
    child = os.fork()
    if child == 0:
        try:
            check()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return status_of(child)


def status_of(child: int) -> int:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Stop:
    """Called in the middle of a change, holds it there until it is told to go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(SECONDS)


@contextmanager
def running(change: Callable[[], object], stop: Stop):
    """`change` in another thread, which is at `stop` while the block runs; it has come to its end afterwards."""
    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert stop.reached.wait(SECONDS)
        yield
    finally:
        stop.go_on.set()
        thread.join(SECONDS)
        assert not thread.is_alive()


def stop_at(monkeypatch, module, name: str, calls: int, stop: Callable[[], object]) -> None:
    """`stop` in front of the so many-th call of `module.name`."""
    original, seen = getattr(module, name), []

    def stopping(*args):
        seen.append(None)
        if len(seen) == calls:
            stop()
        return original(*args)

    monkeypatch.setattr(module, name, stopping)


def patched_modules(model) -> int:
    return sum(derives_from_patched(type(module)) for module in model.modules())


@pytest.mark.parametrize("place", [(layers, "install", 1), (instance_forward, "adopt", 3)], ids=["layers", "a norm"])
def test_a_model_half_patched_at_the_fork_is_unpatched_in_the_child(
    small_model, run, ids, snapshot, monkeypatch, place
):
    model, other = small_model("llama"), small_model("llama")
    expected, before = run(small_model("llama"), ids), snapshot(model)
    stop = Stop()
    stop_at(monkeypatch, *place, stop)

    def check() -> None:
        monkeypatch.undo()
        assert snapshot(model) == before
        rmsnorm_patch.revert(model)
        rmsnorm_patch.apply(other, backend="reference")
        rmsnorm_patch.apply(model, backend="reference")
        assert run(model, ids).same_as(expected)
        rmsnorm_patch.revert(model)
        assert patched_modules(model) == 0

    with running(lambda: rmsnorm_patch.apply(model, backend="reference"), stop):
        assert patched_modules(model) > 0
        status = in_child(check)
    assert status == 0
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds["taken"] == 2


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_half_reverted_at_the_fork_is_reverted_in_the_child(small_model, snapshot, monkeypatch, call, when):
    """One norm, the second module to be released, has a forward of its own to get back."""
    model = small_model("llama")
    norm = model.model.layers[0].input_layernorm
    norm.forward = MethodType(type(norm).forward, norm)
    before = snapshot(model)
    rmsnorm_patch.apply(model, backend="reference")
    stop, original, seen = Stop(), instance_forward.release, []

    def stopping(module, *classes):
        seen.append(module)
        if when == "before" and len(seen) == call:
            stop()
        original(module, *classes)
        if when == "after" and len(seen) == call:
            stop()

    monkeypatch.setattr(instance_forward, "release", stopping)

    def check() -> None:
        assert snapshot(model) == before

    with running(lambda: rmsnorm_patch.revert(model), stop):
        status = in_child(check)
    assert seen[1] is norm
    assert status == 0
    assert snapshot(model) == before


def test_a_fork_by_the_thread_that_is_patching_goes_on_in_both(small_model, run, ids, monkeypatch):
    model, children = small_model("llama"), []
    expected = run(small_model("llama"), ids)
    stop_at(monkeypatch, layers, "install", 1, lambda: children.append(os.fork()))
    status = 1
    try:
        rmsnorm_patch.apply(model, backend="reference")
        after = run(model, ids)
        assert after.same_as(expected)
        assert after.kinds["taken"] == 2
        free = threading.Thread(target=lambda: rmsnorm_patch.revert(model))
        free.start()
        free.join(SECONDS)
        assert not free.is_alive()
        assert patched_modules(model) == 0
        status = 0
    finally:
        if children == [0]:
            os._exit(status)
    assert status_of(children[0]) == 0


def test_forking_while_a_thread_patches_again_and_again(small_model):
    """Wherever the fork falls."""
    model, other = small_model("llama"), small_model("llama")
    end = threading.Event()

    def spin() -> None:
        while not end.is_set():
            rmsnorm_patch.apply(other, backend="reference")
            rmsnorm_patch.revert(other)

    def check() -> None:
        rmsnorm_patch.apply(other, backend="reference")
        rmsnorm_patch.apply(model, backend="reference")
        rmsnorm_patch.revert(other)
        assert patched_modules(other) == 0

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        assert [in_child(check) for _ in range(8)] == [0] * 8
    finally:
        end.set()
        thread.join(SECONDS)


def test_a_lock_held_by_nobody_stays_what_it_is():
    inner = LOCK._lock

    def check() -> None:
        assert LOCK._lock is inner

    assert in_child(check) == 0


def test_a_fork_waits_for_a_kernel_module_that_is_being_loaded(monkeypatch):
    """A module half imported could not be loaded again in the child."""
    stop, loaded = Stop(), []

    def load_all(package, interpreted):
        stop()
        loaded.append(package)
        return {"rms_norm": None}

    monkeypatch.setattr(triton_loader, "_load_all", load_all)
    monkeypatch.setitem(triton_loader._PACKAGES, True, "not_loaded_yet")
    monkeypatch.setattr(triton_loader, "_LOADED", {})
    threading.Timer(0.3, stop.go_on.set).start()

    def check() -> None:
        assert loaded == ["not_loaded_yet"]

    thread = threading.Thread(target=triton_loader.load, args=("rms_norm", True))
    thread.start()
    assert stop.reached.wait(SECONDS)
    assert in_child(check) == 0
    thread.join(SECONDS)


def test_a_fork_does_not_wait_for_ever(monkeypatch):
    stop, lock = Stop(), locks.Lock(waits=True)
    monkeypatch.setattr(locks, "SECONDS", 0.1)

    def hold() -> None:
        with lock:
            stop()

    def check() -> None:
        with lock:
            pass

    with running(hold, stop):
        assert in_child(check) == 0


FIRST_USE = """
import faulthandler, os, sys, threading, time
import rmsnorm_patch

assert "torch" not in sys.modules
started = threading.Event()

def use():
    started.set()
    rmsnorm_patch.apply

threading.Thread(target=use).start()
started.wait()
time.sleep(0.2)  # in the middle of importing torch
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(300, exit=True)
    os._exit(0 if callable(rmsnorm_patch.revert) else 1)
sys.exit(os.waitpid(child, 0)[1] != 0)
"""


def test_a_fork_waits_for_the_first_use_of_the_package():
    """Its functions are imported with it; a child that inherits half an import waits for the rest for ever."""
    done = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
