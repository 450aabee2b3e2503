"""A private, checked store of compiled kernels: one file per key, verified before its bytes are used.

File: MAGIC, 64 hex digits (SHA-256 of the rest), newline, one line of JSON about the artefact, newline, the payload.
A key is made from everything that decides the payload (source digest, options, compiler, capability), so an artefact
never goes stale; time stamps are not consulted. Nothing here unpickles anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from ...errors import KernelBuildError, NoCacheError, RMSNormPatchError, UnsafeCacheError, UnsupportedInput
from ...locks import Lock

DIRECTORY_VARIABLE = "RMSNORM_PATCH_CACHE_DIR"
TIMEOUT_VARIABLE = "RMSNORM_PATCH_LOCK_TIMEOUT"
MAGIC = b"rmsnorm_patch artefact 1\n"
SUFFIX = ".artefact"
_LOCK_SECONDS = 120.0
_DIGITS = 64


class Damaged(Exception):
    """An artefact whose bytes are not those that were written."""


@dataclass(frozen=True)
class Entry:
    """One artefact on disk. state: "ok", or what is wrong with it. meta: what was compiled, with which options."""

    key: str
    path: Path
    size: int
    state: str
    meta: dict[str, Any]


def directory() -> Path:
    """Where artefacts are kept: RMSNORM_PATCH_CACHE_DIR, else the user's cache folder of this system.

    Raises UnsupportedInput for a variable that names no path, NoCacheError where this user has no such folder.
    """
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen is not None and (not chosen.strip() or "\0" in chosen):
        raise UnsupportedInput(DIRECTORY_VARIABLE, repr(chosen), "a path", "set it to a private folder, or unset it")
    if chosen:
        try:
            return Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            raise UnsupportedInput(
                DIRECTORY_VARIABLE, f"{chosen!r}: {error}", "a path", "write the home directory out"
            ) from error
    import platformdirs  # only here: a machine that sets the variable does not need it

    try:
        folder, why = Path(platformdirs.user_cache_dir("rmsnorm_patch")), ""
    except RuntimeError as error:  # platformdirs 4.14; older ones give a relative path
        folder, why = Path(), f": {error}"
    if not folder.is_absolute():  # it would be another one in every working directory
        raise NoCacheError(
            "kernel cache",
            f"a user without a home directory{why}",
            "an absolute HOME or XDG_CACHE_HOME, or a passwd entry",
            f"set {DIRECTORY_VARIABLE} to a writable private directory",
        )
    return folder


def lock_timeout() -> float:
    """Seconds to wait for another process that builds the same kernel: RMSNORM_PATCH_LOCK_TIMEOUT, else 120."""
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return _LOCK_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise UnsupportedInput(TIMEOUT_VARIABLE, repr(text), "seconds, a number above 0", "correct it, or unset it")
    return seconds


def key_of(**parts: object) -> str:
    """A key from named parts; every part enters with its name and its length."""
    digest = hashlib.sha256(MAGIC)
    for name in sorted(parts):
        value = json.dumps(parts[name], sort_keys=True, default=str).encode()
        digest.update(f"{name}={len(value)}:".encode() + value)
    return digest.hexdigest()[:40]


def check_private(folder: Path) -> None:
    """Raise UnsafeCacheError unless `folder` is a real directory, ours, that nobody else can write to."""
    if not hasattr(os, "geteuid"):
        return
    info = os.lstat(folder)
    wrong = ""
    if stat.S_ISLNK(info.st_mode):
        wrong = "a symbolic link"
    elif info.st_uid != os.geteuid():
        wrong = f"owned by uid {info.st_uid}, this process is uid {os.geteuid()}"
    elif info.st_mode & 0o022:
        wrong = "writable by others"
    if wrong:
        raise UnsafeCacheError(
            site=str(folder),
            got=f"{wrong} (owner uid {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o})",
            supported="a directory of this user, mode 0700, no symbolic link",
            next_step=f"chmod 700 it, remove it, or set {DIRECTORY_VARIABLE} to a private directory",
        )


_warned: set[str] = set()
_memory: dict[str, bytes] = {}
_building: dict[str, Lock] = {}
_guard = Lock()


def _memory_only(folder: Path | None, error: OSError) -> None:
    with _guard:
        if str(folder) in _warned:
            return
        _warned.add(str(folder))
    if isinstance(error, NoCacheError):
        why = f"there is no folder for the kernel cache ({error.got})"
    else:
        why = f"the kernel cache {folder} cannot be written ({error.strerror or error})"
    warnings.warn(
        f"rmsnorm_patch: {why}; compiled kernels are "
        f"kept in memory and built again in every process. Set {DIRECTORY_VARIABLE} to a writable private directory.",
        RuntimeWarning,
        stacklevel=3,
    )


def _prepare() -> Path | None:
    """The directory, made (0700) and checked; None, after one warning, where this system does not let us."""
    try:
        folder = directory()
    except NoCacheError as error:
        _memory_only(None, error)
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        check_private(folder)
        if not folder.is_dir():
            raise NotADirectoryError(20, "not a directory", str(folder))
    except OSError as error:
        if isinstance(error, RMSNormPatchError):
            raise
        _memory_only(folder, error)
        return None
    return folder


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _not_a_file(mode: int) -> str:
    """What stands in the place of a file, in words; "" for a file. To open something else may block, or act."""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


_FLAGS = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # the first two for what is put there after the look at it
    _FLAGS |= getattr(os, _name, 0)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """(meta, payload) of one artefact, after its owner, digest and key were checked; Damaged or OSError otherwise."""
    wrong = _not_a_file(os.lstat(path).st_mode)
    if wrong:
        raise Damaged(wrong)
    descriptor = os.open(path, _FLAGS)
    try:
        wrong = _not_a_file(os.fstat(descriptor).st_mode)
    finally:
        if wrong:
            os.close(descriptor)
    if wrong:
        raise Damaged(wrong)
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if hasattr(os, "geteuid") and (info.st_uid != os.geteuid() or info.st_mode & 0o022):
            raise Damaged(f"owner uid {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o}")
        content = file.read()
    head = len(MAGIC) + _DIGITS + 1
    if len(content) < head or not content.startswith(MAGIC):
        raise Damaged("truncated or not an artefact")
    if hashlib.sha256(content[head:]).hexdigest().encode() != content[len(MAGIC) : head - 1]:
        raise Damaged("the digest does not match")
    line, _, payload = content[head:].partition(b"\n")
    try:
        meta = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its description cannot be read ({type(error).__name__})") from error
    if not isinstance(meta, dict) or meta.get("key") != path.stem:
        raise Damaged("it was written for another key")
    return meta, payload


def _remove(path: Path) -> None:
    """Whatever it is, a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move_aside(path: Path, target: Path) -> str:
    """Move whatever `path` is to `target`, whatever that was; what became of it, in words."""
    try:
        try:
            os.replace(path, target)
        except OSError:  # a file over a folder, or the other way round
            _remove(target)
            os.replace(path, target)
    except OSError as error:
        return f"it could not be moved aside ({error.strerror or error})"
    return f"it was moved to {target.name}"


def _quarantine(path: Path, why: str) -> None:
    """Move a damaged artefact aside, so that nothing loads it and it can still be looked at."""
    done = _move_aside(path, path.with_suffix(".quarantined"))
    warnings.warn(
        f"rmsnorm_patch: refused the cached kernel {path} ({why}); {done} and is built again",
        RuntimeWarning,
        stacklevel=3,
    )


def _load(path: Path, fault: Callable[[bytes], str]) -> bytes | None:
    try:
        payload = read(path)[1]
        wrong = fault(payload)
        if wrong:
            raise Damaged(wrong)
        return payload
    except FileNotFoundError:
        return None
    except (Damaged, ValueError, OSError) as error:
        _quarantine(path, str(error))
        return None


def _store(path: Path, meta: dict[str, Any], payload: bytes) -> None:
    body = json.dumps(meta, sort_keys=True).encode() + b"\n" + payload
    content = MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        _memory_only(path.parent, error)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the key's lock; the system releases it when its holder dies. A file system without locks goes unlocked:
    the atomic rename keeps artefacts whole, at worst a kernel is built twice."""
    lock_path = path.with_suffix(".lock")
    seconds = lock_timeout()
    if not _can_be_locked(lock_path):
        yield
        return
    lock = filelock.FileLock(lock_path, timeout=seconds, mode=0o600)
    held = False
    try:
        try:
            lock.acquire()
            held = True
        except filelock.Timeout as error:
            raise KernelBuildError(
                site=str(lock_path),
                got=f"lock still held by another process after {seconds:g} s",
                supported=f"waiting {TIMEOUT_VARIABLE} seconds for one build",
                next_step=f"end the process that holds it, or raise {TIMEOUT_VARIABLE}",
            ) from error
        except (OSError, NotImplementedError):
            pass
        yield
    finally:
        if held:
            lock.release()


def _can_be_locked(path: Path) -> bool:
    """Whether a lock file is or can be made at `path`; what else stands there is moved aside."""
    try:
        wrong = _not_a_file(path.lstat().st_mode)
    except OSError:
        return True
    if not wrong:
        return True
    done = _move_aside(path, path.with_name(f"{path.name}.quarantined"))
    warnings.warn(
        f"rmsnorm_patch: {path}, a lock of the kernel cache, is {wrong}; {done}", RuntimeWarning, stacklevel=5
    )
    return not os.path.lexists(path)


def _no_fault(payload: bytes) -> str:
    return ""


def get_or_build(
    key: str, build: Callable[[], bytes], meta: dict[str, Any], fault: Callable[[bytes], str] = _no_fault
) -> bytes:
    """The artefact of `key`: from memory, from disk, or built once among all processes that share the directory.

    fault: what is wrong with bytes that are as they were written, in words, "" if nothing is; such an artefact is
        refused like a damaged one.
    Raises UnsafeCacheError for a directory that others can write to, KernelBuildError where a lock stays held.
    """
    with _guard:
        if key in _memory:
            return _memory[key]
        mine = _building.setdefault(key, Lock())
    with mine:
        if key not in _memory:
            _memory[key] = _from_disk_or_build(key, build, meta, fault)
    return _memory[key]


def _from_disk_or_build(
    key: str, build: Callable[[], bytes], meta: dict[str, Any], fault: Callable[[bytes], str]
) -> bytes:
    folder = _prepare()
    if folder is None:
        return build()
    path = folder / f"{key}{SUFFIX}"
    payload = _load(path, fault)
    if payload is not None:
        return payload
    with _locked(path):
        payload = _load(path, fault)  # another process may have built it while this one waited
        if payload is None:
            payload = build()
            _store(path, {**meta, "key": key}, payload)
    return payload


def entries() -> list[Entry]:
    """Every artefact on disk with its state, damaged ones included; reads and checks all of them."""
    folder = directory()
    if not folder.is_dir():
        return []
    check_private(folder)
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        meta: dict[str, Any] = {}
        try:
            meta, _ = read(path)
            state = "ok"
        except (Damaged, ValueError, OSError) as error:
            state = str(error)
        with contextlib.suppress(FileNotFoundError):  # another process may have moved it
            found.append(Entry(path.stem, path, path.lstat().st_size, state, meta))
    return found


def verify() -> list[Entry]:
    """The damaged artefacts; each is moved into quarantine and will be built again."""
    damaged = [entry for entry in entries() if entry.state != "ok"]
    for entry in damaged:
        _quarantine(entry.path, entry.state)
    return damaged


def clear() -> int:
    """Remove every artefact, lock and quarantined file of the cache; number of artefacts removed."""
    folder = directory()
    if not folder.is_dir():
        return 0
    check_private(folder)
    removed = 0
    for path in folder.iterdir():
        if path.suffix in (SUFFIX, ".lock", ".quarantined") or path.name.startswith(".new-"):
            _remove(path)
            removed += path.suffix == SUFFIX
    return removed


def forget() -> None:
    """Drop the artefacts that this process holds in memory; the next use reads the disk again."""
    with _guard:
        _memory.clear()
