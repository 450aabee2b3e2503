"""From a schedule and the types of a call to machine code: the -D line, the cache key, the compilation."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ...backends.cuda.schedules import Config
from ...kernel_files import kernels_dir
from ...numerics.spec import NormSpec
from . import cache, nvrtc
from .arguments import Arguments, declared

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OFFSETS = {"none": 0, "fp32": 1, "weight_dtype": 2}


@dataclass(frozen=True)
class Build:
    """Everything that decides the machine code of one kernel.

    n: columns that share an rstd (the group of a grouped norm, of which a row has `weight_rows`).
    align, weight_align: bytes, see ALIGN and W_ALIGN in `kernels/cuda/abi.cuh`. arch: the device's sm number.
    """

    config: Config
    spec: NormSpec
    fused_add: bool
    n: int
    weight_rows: int
    x_dtype: torch.dtype
    weight_dtype: torch.dtype | None
    align: int
    weight_align: int
    two_level: bool
    arch: int

    def defines(self) -> dict[str, int]:
        """Every macro that the sources read, by name."""
        spec, config = self.spec, self.config
        weight = self.weight_dtype if spec.has_weight else None
        return {
            "N": self.n,
            "X_T": DTYPE_CODES[self.x_dtype],
            "W_T": DTYPE_CODES[weight or self.x_dtype],
            "OUT_T": DTYPE_CODES[spec.output_dtype(self.x_dtype, weight)],
            "ROUND_T": DTYPE_CODES[spec.rounded_dtype(self.x_dtype, weight)],
            "HAS_WEIGHT": int(weight is not None),
            "OFFSET": _OFFSETS[spec.weight_offset] if weight is not None else 0,
            "FUSED_ADD": int(self.fused_add),
            "SUM_F32": int(self.fused_add and spec.sum == "fp32"),
            "WIDTH": self.n if spec.group else spec.width or self.n,
            "WEIGHT_ROWS": self.weight_rows if weight is not None else 1,
            "VEC": config.vec,
            "ALIGN": self.align,
            "W_ALIGN": self.weight_align,
            "STRIDE2": int(self.two_level),
            "THREADS_PER_ROW": config.threads_per_row,
            "ROWS_PER_CTA": config.rows_per_cta,
            "ROWS_PER_THREAD": config.rows_per_thread,
            "THREADS": config.threads,
            "CLUSTER": config.cluster,
            "MIN_CTAS": config.min_ctas,
            **dict(config.defines),
        }

    def architecture(self, supported: tuple[int, ...] | None = None) -> str:
        """ "sm_90": machine code for this device; "compute_120": PTX, for a device newer than the compiler, which its
        driver then translates."""
        known = nvrtc.supported_architectures() if supported is None else supported
        if self.arch in known:
            return f"sm_{self.arch}{self.config.arch_suffix}"
        return f"compute_{max((arch for arch in known if arch < self.arch), default=min(known))}"

    def options(self) -> tuple[str, ...]:
        """The compiler's options without the architecture."""
        return (
            "--std=c++17",
            "--device-as-default-execution-space",
            *(f"-D{name}={value}" for name, value in self.defines().items()),
        )


class Source(NamedTuple):
    """One kernel file. text: with assertions that the compiler sees the arguments as they were read. headers: the texts
    that it can include, by name. digest: over both. arguments: what it declares as its launch arguments."""

    text: str
    headers: dict[str, str]
    digest: str
    arguments: Arguments


@lru_cache(maxsize=64)
def source_of(name: str) -> Source:
    """The kernel file `name`, read once per process. Errors as `arguments.declared`."""
    folder = kernels_dir() / "cuda"
    text = (folder / name).read_text(encoding="utf-8")
    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))}
    arguments = declared(name, text, headers)
    text = f"{text}\n{arguments.assertions()}"
    digest = hashlib.sha256(text.encode())
    for header, content in headers.items():
        digest.update(f"\0{header}\0{content}".encode())
    return Source(text, headers, digest.hexdigest(), arguments)


def machine_code(build: Build) -> bytes:
    """The kernel's cubin (or PTX): from memory, the disk cache, or compiled now."""
    text, headers, digest, _ = source_of(build.config.source)
    compiler = nvrtc.find()
    options = build.options()
    key = cache.key_of(
        source=digest,
        options=options,
        compiler=compiler.identity if compiler else "none",
        arch=build.arch,
        suffix=build.config.arch_suffix,
    )

    def compile_now() -> bytes:
        architecture = f"--gpu-architecture={build.architecture()}"
        return nvrtc.compile_source(build.config.source, text, headers, (architecture, *options))

    meta = {"kernel": build.config.kernel, "arch": build.arch, "options": options, "source_sha256": digest}
    return cache.get_or_build(key, compile_now, meta, lambda code: _fault(code, build.config.entry))


_ELF_HEADER = struct.Struct("<4sB13xH12xQ14xHH")
_CUDA_MACHINE = 190


def _fault(code: bytes, entry: str) -> str:
    """Why `code` cannot be a cubin or PTX with the kernel `entry`, or "". The driver's own answer would come too late:
    the artefact would be refused again in every process."""
    if entry.encode() not in code:
        return f"it holds no kernel {entry}"
    if code.lstrip().startswith((b"//", b".version")):
        return "" if code.endswith(b"\0") else "PTX without its end"
    if len(code) < _ELF_HEADER.size or not code.startswith(b"\x7fELF"):
        return "neither a cubin nor PTX"
    _, bits, machine, segments, size, count = _ELF_HEADER.unpack_from(code)
    if (bits, machine) != (2, _CUDA_MACHINE):
        return f"an object for another machine ({machine})"
    if segments + size * count > len(code):  # their table is the last part of a cubin
        return "a cubin without its end"
    return ""
