"""Locks that no fork leaves held for ever.

A forked child has one thread, the one that forked. What another thread held stays held there, and what it was changing
stays half changed. Here the child gets such a lock back free, after what it guarded was mended.

Forking does not wait for a lock in general: its holder may run a user's code, which may wait for the thread that forks.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  see below
import logging  # noqa: F401
import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType

SECONDS = 30.0


class Lock:
    """Re-entrant; used in a `with` statement.

    mend: called in a child whose parent had another thread inside, which is not there to finish; the lock is free.
    waits: a fork waits until no other thread is inside, but no longer than SECONDS. For short work that runs no code
        of others and cannot be mended.
    """

    def __init__(self, mend: Callable[[], None] | None = None, waits: bool = False) -> None:
        self._lock = threading.RLock()
        self._mend = mend
        self.waits = waits
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def acquire(self, seconds: float) -> bool:
        return self._lock.acquire(timeout=seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def renew(self) -> Callable[[], None] | None:
        """In a child: free this lock if a thread that is not there holds it; what is then to be called."""
        if self._lock.acquire(blocking=False):  # free, or held by the thread that forked and goes on here
            self._lock.release()
            return None
        self._lock = threading.RLock()
        return self._mend


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
_forking = threading.local()


def _before() -> None:
    _forking.held = []
    for lock in [lock for lock in _locks if lock.waits]:
        if lock.acquire(SECONDS):
            _forking.held.append(lock)


def _release() -> None:
    for lock in _forking.__dict__.pop("held", ()):
        lock.__exit__(None, None, None)


def _in_child() -> None:
    _release()
    mending = [mend for mend in [lock.renew() for lock in list(_locks)] if mend is not None]
    for mend in mending:
        mend()


# Hooks run last registered first. Those of the two modules above hold locks that an import needs, so they must come
# after ours, which wait for one.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_release, after_in_child=_in_child)
