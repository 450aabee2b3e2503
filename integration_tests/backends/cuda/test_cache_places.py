"""What else than a file may stand in the cache, and users who have no folder for one.

To open a FIFO waits for its other end, for ever. Each test that meets one runs in a child, which is killed if it hangs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock  # noqa: F401  now: a child that has become another user may not be able to read these files
import platformdirs
import pytest

from rmsnorm_patch.backends.cuda import cache, jit
from rmsnorm_patch.cli import environment
from rmsnorm_patch.errors import NoCacheError, UnsupportedInput
from rmsnorm_patch.ops.dispatch import BUILT_CAPABILITIES

KEY = "a" * 40
ELF = b"\x7fELF"
HOMES = ("HOME", "XDG_CACHE_HOME", cache.DIRECTORY_VARIABLE)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("a file")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        there = os.getcwd()
        os.chdir(path.parent)  # the address of a socket is 107 bytes at most
        try:
            made.bind(path.name)
        finally:
            os.chdir(there)


def _link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.write_text("not ours")
    path.symlink_to(target)


PUT: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a folder": _folder,
    "a socket": _socket,
    "a symbolic link": _link,
    "a symbolic link, dangling": lambda path: path.symlink_to(path.parent.parent / "nowhere"),
    "a symbolic link, to itself": lambda path: path.symlink_to(path),
    "a device": lambda path: os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5)),  # /dev/zero, which never ends
}


@pytest.fixture
def within(fork, tmp_path) -> Callable[..., None]:
    """`within(work)`: `work` comes to its end in a child, in time."""

    def run(work: Callable[[], None]) -> None:
        child = fork(work)
        child.join(300)  # a guard against a hang
        assert child.exitcode == 0

    return run


@pytest.fixture
def ready(cache_dir) -> Path:
    cache_dir.mkdir(mode=0o700)
    return cache_dir


def put(kind: str, path: Path) -> None:
    try:
        PUT[kind](path)
    except PermissionError:
        pytest.skip(f"{kind} cannot be made here")


def built(*warned: str) -> None:
    """The artefact is built, and a warning holds each of `warned`; the next look finds it on disk without one."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert cache.get_or_build(KEY, lambda: b"code", {}) == b"code"
        cache.forget()
        assert cache.get_or_build(KEY, lambda: b"built again", {}) == b"code"
    messages = [str(w.message) for w in seen]
    assert len(messages) == len(warned)
    for message, part in zip(messages, warned, strict=True):
        assert part in message


@pytest.mark.parametrize("kind", PUT)
def test_what_is_no_file_in_an_artefacts_place_is_moved_aside(ready, within, kind):
    path = ready / f"{KEY}{cache.SUFFIX}"
    put(kind, path)
    word = kind.partition(",")[0]

    def work() -> None:
        (listed,) = cache.entries()
        assert listed.state == word
        built(word)
        assert (path.with_suffix(".quarantined")).is_symlink() or path.with_suffix(".quarantined").exists()
        assert cache.verify() == []

    within(work)
    elsewhere = ready.parent / "elsewhere"
    assert not elsewhere.exists() or elsewhere.read_text() == "not ours"
    assert not (ready.parent / "nowhere").exists()


@pytest.mark.parametrize(("kind", "said"), [("a FIFO", "a FIFO"), ("a symbolic link", "symbolic links")])
def test_what_is_put_there_after_the_look_at_it_is_not_read(ready, within, monkeypatch, kind, said):
    (ready / "file").touch()
    looked_at = os.lstat(ready / "file")
    path = ready / f"{KEY}{cache.SUFFIX}"
    put(kind, path)

    def work() -> None:
        monkeypatch.setattr(os, "lstat", lambda path: looked_at)
        with pytest.raises((cache.Damaged, OSError), match=said):
            cache.read(path)

    within(work)


@pytest.mark.parametrize("kind", PUT)
def test_what_is_no_file_in_a_locks_place_is_moved_aside(ready, within, kind):
    path = ready / f"{KEY}.lock"
    put(kind, path)

    def work() -> None:
        built(kind.partition(",")[0])
        assert path.is_file()

    within(work)
    elsewhere = ready.parent / "elsewhere"
    assert not elsewhere.exists() or elsewhere.read_text() == "not ours"
    assert not (ready.parent / "nowhere").exists()


@pytest.mark.parametrize("kind", ["a FIFO", "a folder"])
def test_what_stands_where_things_are_moved_to_makes_room(ready, within, kind):
    path = ready / f"{KEY}{cache.SUFFIX}"
    _folder(path)
    put(kind, path.with_suffix(".quarantined"))

    def work() -> None:
        built("a folder")
        assert (path.with_suffix(".quarantined") / "inside").is_file()

    within(work)


def test_a_cache_full_of_other_things_can_be_listed_checked_and_cleared(ready, within):
    for number, kind in enumerate(["a FIFO", "a folder", "a socket", "a symbolic link"]):
        for suffix in (cache.SUFFIX, ".lock", ".quarantined"):
            path = ready / f"{number}{suffix}"
            if suffix == cache.SUFFIX or kind != "a socket":
                PUT[kind](path)

    def work() -> None:
        assert len(cache.entries()) == 4
        with pytest.warns(RuntimeWarning, match="refused"):
            assert len(cache.verify()) == 4
        assert cache.entries() == []
        os.mkfifo(ready / f"{KEY}{cache.SUFFIX}")
        assert cache.clear() == 1
        assert list(ready.iterdir()) == []

    within(work)


def rewritten(path: Path, payload: bytes) -> None:
    """An artefact as it would be written, digest and all, with another payload."""
    meta, _ = cache.read(path)
    cache._store(path, meta, payload)
    assert cache.read(path) == (meta, payload)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda code: b"", "no kernel scale_rows"),
        (lambda code: b"scale_rows, but no object", "neither a cubin nor PTX"),
        (lambda code: code[: len(code) // 2] + b"scale_rows", "without its end"),
        (lambda code: code[:-1], "without its end"),
        (lambda code: code.replace(b"scale_rows", b"other_name"), "no kernel scale_rows"),
        (lambda code: Path(sys.executable).resolve().read_bytes() + b"scale_rows", "another machine"),
        (lambda code: b"// scale_rows\n.version 9.0\n", "PTX without its end"),
    ],
    ids=["empty", "text", "cut", "a byte short", "another kernel", "a program", "PTX cut"],
)
def test_an_intact_artefact_that_is_no_kernel_is_built_again(cache_dir, build, compiles, change, said):
    code = jit.machine_code(build())
    (path,) = cache_dir.glob(f"*{cache.SUFFIX}")
    rewritten(path, change(code))
    cache.forget()
    with pytest.warns(RuntimeWarning, match=said):
        assert jit.machine_code(build()) == code
    assert compiles() == 2
    cache.forget()
    assert jit.machine_code(build()) == code
    assert compiles() == 2


@pytest.mark.parametrize("arch", [*BUILT_CAPABILITIES, 199])
def test_what_the_compiler_makes_has_no_fault(cache_dir, build, compiles, arch):
    """For 199, which no compiler knows, that is PTX."""
    jit.machine_code(build(arch=arch))
    cache.forget()
    jit.machine_code(build(arch=arch))
    assert compiles() == 1


@pytest.mark.parametrize("line", [b"[]", b"{}", b"null", b"[" * 100_000, b"\xff", b""])
def test_an_intact_artefact_with_another_description_is_refused(ready, line):
    path = ready / f"{KEY}{cache.SUFFIX}"
    body = line + b"\ncode"
    path.write_bytes(cache.MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    path.chmod(0o600)
    with pytest.raises(cache.Damaged):
        cache.read(path)
    built("refused")


def as_nobody() -> None:
    """Become a user without a passwd entry; HOME is unset."""
    if os.geteuid():
        pytest.skip("needs root to become another user")
    os.setgid(4242)
    os.setuid(4242)


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_no_home_means_memory_and_one_warning(monkeypatch, within, tmp_path, home):
    """As in a container that runs under a number (Kubernetes' runAsUser)."""
    if os.geteuid():
        pytest.skip("needs root to become another user")
    for name in HOMES:
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    cache.forget()
    cache._warned.clear()

    def work() -> None:
        tmp_path.chmod(0o777)
        as_nobody()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert [cache.get_or_build(key, lambda: b"code", {}) for key in ("a", "b", "a")] == [b"code"] * 3
        (message,) = [str(w.message) for w in seen]
        assert "without a home directory" in message
        assert cache.DIRECTORY_VARIABLE in message
        with pytest.raises(NoCacheError):
            cache.entries()
        assert cache.DIRECTORY_VARIABLE in environment._cache().state

    within(work)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_a_relative_folder_is_no_place_for_a_cache(monkeypatch, tmp_path, variable):
    """It would be another one in every working directory."""
    for name in HOMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "relative")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(NoCacheError):
        assert cache.directory().is_absolute()
    assert list(tmp_path.iterdir()) == []


def test_what_older_platformdirs_say_without_a_home_is_no_folder(monkeypatch):
    monkeypatch.delenv(cache.DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: f"~/.cache/{name}")
    with pytest.raises(NoCacheError) as caught:
        cache.directory()
    assert cache.DIRECTORY_VARIABLE in caught.value.next_step


def test_a_variable_with_a_home_that_nobody_has_is_named(monkeypatch):
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, "~no-such-user/cache")
    with pytest.raises(UnsupportedInput, match=cache.DIRECTORY_VARIABLE):
        cache.directory()


@pytest.mark.parametrize("home", ["/proc/nobody", "/dev/null/home"])
def test_a_home_that_cannot_be_made_means_memory_and_one_warning(monkeypatch, home):
    for name in HOMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    cache.forget()
    cache._warned.clear()
    with pytest.warns(RuntimeWarning, match="kept in memory") as seen:
        assert [cache.get_or_build(key, lambda: b"code", {}) for key in ("a", "b", "a")] == [b"code"] * 3
    assert len(seen) == 1
    cache.forget()
    cache._warned.clear()
