"""NVRTC through ctypes: find the library that torch's CUDA wheels bring, compile a source to machine code.

ctypes and not a binding package: compilation happens once per kernel, eight C functions are used, their signatures have
not changed since CUDA 11.1, and a user then needs nothing beyond torch.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ...errors import KernelBuildError

_LIBRARY_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "libnvrtc.so")


@dataclass(frozen=True)
class Compiler:
    """One NVRTC library on disk. identity: changes when another build of the compiler takes its place."""

    path: Path
    identity: str


def _folders() -> list[Path]:
    """Where to look, best first: the wheels beside torch, then a CUDA toolkit."""
    folders: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        folders += [Path(root, name, "lib") for name in ("cu13", "cuda_nvrtc")]
        folders += [Path(root, name, "bin") for name in ("cu13", "cuda_nvrtc")]
    folders.append(Path(torch.__file__).parent / "lib")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders += [Path(os.environ[variable], name) for name in ("lib64", "lib", "bin")]
    folders += [Path("/usr/local/cuda/lib64"), Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu")]
    return folders


@lru_cache(maxsize=1)
def find() -> Compiler | None:
    """The NVRTC to use, without loading it (110 MB; a kernel from the disk cache needs only its identity)."""
    wanted = (torch.version.cuda or "").split(".")[0]
    found: list[Path] = []
    for folder in _folders():
        found += [folder / name for name in _LIBRARY_NAMES if (folder / name).is_file()]
    if not found:
        return None
    # A compiler of torch's own CUDA major version first: the driver is known to take what that one makes.
    path = next((path for path in found if wanted and f".{wanted}" in path.name), found[0])
    with open(path, "rb") as file:
        head = hashlib.sha256(file.read(65536)).hexdigest()[:16]  # holds the ELF build id
    return Compiler(path, f"{path.name}:{path.stat().st_size}:{head}")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    compiler = find()
    if compiler is None:
        raise KernelBuildError(
            site="NVRTC",
            got="no libnvrtc beside torch, under CUDA_HOME or /usr/local/cuda",
            supported="NVRTC 12.6 or newer",
            next_step="pip install nvidia-cuda-nvrtc, or use backend='triton'",
        )
    try:
        # The compiler opens its builtins by bare name; loaded here, they are found wherever it lies.
        for builtins in sorted(compiler.path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
        library = ctypes.CDLL(str(compiler.path))
    except OSError as error:
        raise KernelBuildError(
            site=str(compiler.path),
            got=str(error),
            supported="an NVRTC library of this system",
            next_step="reinstall nvidia-cuda-nvrtc, or use backend='triton'",
        ) from error
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


@lru_cache(maxsize=1)
def supported_architectures() -> tuple[int, ...]:
    """The sm numbers that the installed NVRTC makes machine code for."""
    library = _library()
    count = ctypes.c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    numbers = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(numbers), "nvrtcGetSupportedArchs")
    return tuple(numbers)


def version() -> tuple[int, int]:
    """(major, minor) of the installed NVRTC."""
    library = _library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def _check(library: ctypes.CDLL, code: int, call: str) -> None:
    if code:
        raise KernelBuildError(
            site=f"NVRTC {call}",
            got=library.nvrtcGetErrorString(code).decode(),
            supported="NVRTC 12.6 or newer",
            next_step="reinstall nvidia-cuda-nvrtc, or use backend='triton'",
        )


def compile_source(name: str, source: str, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
    """Machine code (`--gpu-architecture=sm_XX`) or PTX (`compute_XX`) of one translation unit.

    headers: the texts that `#include` can find, by name; nothing on disk is read. Raises KernelBuildError with the
    compiler's log and the options.
    """
    library = _library()
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names)
    _check(library, code, "nvrtcCreateProgram")
    try:
        code = library.nvrtcCompileProgram(program, len(options), arguments)
        if code:
            raise KernelBuildError(
                site=f"kernels/cuda/{name}, options {' '.join(options)}",
                got=f"{library.nvrtcGetErrorString(code).decode()}\n{_text(library, program, 'ProgramLog')}",
                supported="a source that NVRTC compiles",
                next_step="use backend='triton', and report this message with the output of `rmsnorm-patch env`",
            )
        machine_code = any(option.startswith("--gpu-architecture=sm_") for option in options)
        return _bytes(library, program, "CUBIN" if machine_code else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    content = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, content), f"nvrtcGet{what}")
    return content.raw


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    return _bytes(library, program, what).rstrip(b"\0").decode(errors="replace")
