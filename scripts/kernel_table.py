"""Compile the CUDA kernels for GPUs that need not be present, read the machine code, write docs/kernels.md.

    python scripts/kernel_table.py           # write the page
    python scripts/kernel_table.py --check   # exit 1 if the page was made from other sources

Needs NVRTC and Triton, whose wheel carries the disassembler. The tests of machine code use the same reader.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rmsnorm_patch.backends.cuda import jit, nvrtc, registry, schedules  # noqa: E402
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes/s by the vendor's datasheet; threads: resident per multiprocessor."""

    name: str
    multiprocessors: int
    bandwidth: float
    threads: int


GPUS = {
    80: Gpu("A100 80GB", 108, 2.0e12, 2048),
    89: Gpu("L40S", 142, 0.864e12, 1536),
    90: Gpu("H200", 132, 4.8e12, 2048),
    100: Gpu("B200", 148, 8.0e12, 2048),
    103: Gpu("B300", 148, 8.0e12, 2048),
    120: Gpu("RTX PRO 6000", 188, 1.79e12, 1536),
}


@dataclass(frozen=True)
class MachineCode:
    """What the disassembly of one kernel says. Widths in bits."""

    registers: int
    stack: int
    local_accesses: int
    loads: Counter[int]
    stores: Counter[int]
    loads_before_wait: int
    waits: int
    gpu_fences: int

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local_accesses > 0


@cache
def _tool(name: str) -> str:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} comes with Triton's wheel: pip install triton")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def run(tool: str, *arguments: str) -> str:
    """The output of Triton's tool, or of the one on PATH where Triton's does not know the architecture."""
    for program in (_tool(tool), shutil.which(tool)):
        if program is not None:
            result = subprocess.run([program, *arguments], capture_output=True, text=True)
            if result.returncode == 0:
                return result.stdout
    raise SystemExit(f"{tool}: {result.stderr}")


def _width(opcode: str) -> int:
    for part in reversed(opcode.split(".")):
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U16", "S16", "16"):
            return 16
    return 32


_ELF = struct.Struct("<40xQ10xHHH")
_SECTION = struct.Struct("<I20xQQ24x")
INSTRUCTION = 16
"""Bytes, on every architecture here."""


def instructions_of(cubin: bytes) -> bytes:
    """The instructions of a cubin, without what describes them."""
    table, size, count, of_names = _ELF.unpack_from(cubin)
    sections = [_SECTION.unpack_from(cubin, table + index * size) for index in range(count)]
    names = sections[of_names][1]
    return b"".join(
        cubin[start : start + length] for name, start, length in sections if cubin.startswith(b".text.", names + name)
    )


def opcodes(listing: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing)


def disassembled(cubins: Sequence[bytes], architecture: str) -> list[list[str]]:
    """The opcodes of each cubin. All are read in one piece: the disassembler takes much longer to start than to read.

    architecture: "sm_90", for example. SystemExit where the listing has another number of instructions than the code.
    """
    pieces = [instructions_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(pieces))
        file.flush()
        listing = run("nvdisasm", "--binary", architecture.replace("sm_", "SM"), file.name)
    found = opcodes(listing)
    ends = list(itertools.accumulate(len(piece) // INSTRUCTION for piece in pieces))
    if len(found) != ends[-1]:
        raise SystemExit(f"nvdisasm lists {len(found)} instructions of {architecture}, the code has {ends[-1]}")
    return [found[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _read(cubin: bytes, lines: list[str]) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("cuobjdump", "-res-usage", file.name)
    wait = lines.index("ACQBULK") if "ACQBULK" in lines else 0
    return MachineCode(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        stack=int(re.search(r"STACK:(\d+)", usage).group(1)),  # type: ignore[union-attr]
        local_accesses=sum(line.startswith(("LDL", "STL")) for line in lines),
        loads=Counter(_width(line) for line in lines if line.startswith("LDG")),
        stores=Counter(_width(line) for line in lines if line.startswith("STG")),
        loads_before_wait=sum(line.startswith("LDG") for line in lines[:wait]),
        waits=lines.count("ACQBULK"),
        gpu_fences=sum(line.startswith("MEMBAR") and line.endswith(".GPU") for line in lines),
    )


def natural_alignment(n: int, itemsize: int) -> int:
    """Bytes by which the rows of a contiguous, freshly allocated [m, n] tensor are aligned (32 at most)."""
    row = n * itemsize
    return min(32, row & -row)


def build(
    config: schedules.Config,
    spec: NormSpec,
    fused: bool,
    n: int,
    arch: int,
    x: torch.dtype = torch.bfloat16,
    weight: torch.dtype | None = torch.bfloat16,
    align: int | None = None,
) -> jit.Build:
    alignment = natural_alignment(n, x.itemsize) if align is None else align
    return jit.Build(
        config=config,
        spec=spec,
        fused_add=fused,
        n=n,
        weight_rows=1,
        x_dtype=x,
        weight_dtype=weight,
        align=alignment,
        weight_align=alignment,
        two_level=False,
        arch=arch,
    )


def compiled(build: jit.Build) -> bytes:
    """Compiled now, not taken from a cache: what is read is what the sources say."""
    text, headers, *_ = jit.source_of(build.config.source)
    options = (f"--gpu-architecture={build.architecture()}", *build.options())
    return nvrtc.compile_source(build.config.source, text, headers, options)


def machine_code(builds: Iterable[jit.Build]) -> dict[jit.Build, MachineCode]:
    """What each build's code says; a build that is asked for twice is compiled once."""
    cubins = {build: compiled(build) for build in dict.fromkeys(builds)}
    found = {}
    for architecture in sorted({build.architecture() for build in cubins}):
        alike = [build for build in cubins if build.architecture() == architecture]
        for build, lines in zip(alike, disassembled([cubins[build] for build in alike], architecture), strict=True):
            found[build] = _read(cubins[build], lines)
    return found


def digest() -> str:
    """Identity of the sources and rules that the page describes."""
    total = hashlib.sha256()
    for path in sorted(
        [*(ROOT / "kernels" / "cuda").glob("*.cu*"), *(ROOT / "kernels" / "cuda").glob("schedules/*"), Path(__file__)]
    ):
        total.update(f"{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


SHAPES = ((128, torch.bfloat16), (1024, torch.bfloat16), (4096, torch.bfloat16), (7168, torch.bfloat16),
          (16384, torch.bfloat16), (65536, torch.bfloat16), (4096, torch.float32), (5125, torch.bfloat16))  # fmt: skip


def _rows_text(low: int, high: int) -> str:
    return f"{low} and more" if high >= registry.UNBOUNDED else f"{low} to {high}"


def table_row(config: schedules.Config, n: int, x: torch.dtype, arch: int, code: MachineCode) -> list[str]:
    gpu = GPUS[arch]
    defines = dict(config.defines)
    allocated = -(-config.threads // 128) * 128
    ctas = max(1, min(65536 // (allocated * code.registers), gpu.threads // config.threads))
    chunks = -(-n // (config.vec * config.threads_per_row * config.cluster)) * config.rows_per_thread
    in_flight = ctas * config.threads * min(chunks, defines["STAGE"]) * config.vec * x.itemsize * 2
    return [
        {torch.bfloat16: "bf16", torch.float32: "fp32"}[x],
        str(n),
        _rows_text(*config.m),
        config.kernel,
        f"{config.threads_per_row} x {config.rows_per_cta // config.rows_per_thread}"
        + (f", cluster {config.cluster}" if config.cluster > 1 else ""),
        str(ctas),
        str(code.registers),
        "/".join(f"{width}" for width in sorted(code.loads, reverse=True)),
        f"{in_flight / 1024:.0f}",
    ]


HEAD = ["dtype", "N", "rows", "kernel", "threads per row x rows side by side", "CTAs per SM", "registers",
        "load bits", "KiB in flight per SM"]  # fmt: skip


def faults(kernels: Sequence[MachineCode]) -> list[str]:
    """What no kernel should do, and how many do: a column would say the same in each row."""
    early = sum(code.waits > 0 and code.loads_before_wait > 0 for code in kernels)
    spilled = sum(code.spills for code in kernels)
    return [
        f"- Of {len(kernels)} kernels {early or 'none'} loads anything before it waits for the previous kernel",
        "  (griddepcontrol, sm_90 and later). Prefetches to L2 are not counted.",
        f"- Of {len(kernels)} kernels {spilled or 'none'} spills registers to memory.",
    ]


def tables() -> tuple[list[str], list[MachineCode]]:
    """A table for each GPU, and the machine code that its rows are read from."""
    lines, read = list[str](), list[MachineCode]()
    for arch, gpu in GPUS.items():
        lines += ["", f"## sm_{arch} ({gpu.name}: {gpu.multiprocessors} SMs, {gpu.bandwidth / 1e12:g} TB/s)", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        shown = {
            (config, n, x): build(config, LLAMA, True, n, arch, x, x)
            for n, x in SHAPES
            for config in schedules.schedules("fused_add_rms_norm", x, n, arch)
        }
        codes = machine_code(shown.values())
        for (config, n, x), each in shown.items():
            lines.append("| " + " | ".join(table_row(config, n, x, arch, codes[each])) + " |")
            read.append(codes[each])
    return lines, read


def page() -> str:
    rows, read = tables()
    lines = [
        "# The CUDA kernels, read from their machine code",
        "",
        "Made by `python scripts/kernel_table.py` from `kernels/` with "
        f"NVRTC {'.'.join(map(str, nvrtc.version()))}; no GPU is needed. Sources: `{digest()}`.",
        "",
        "Fused residual-add + RMSNorm, weight in x's dtype, rounding as in Llama.",
        "",
        *faults(read),
        "- *In flight*: bytes of x and residual that one multiprocessor has asked for at a time.",
        "",
        "Only sm_90 was measured ([records](../records/README.md), [decisions](decisions/kernels.md)).",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def is_current() -> bool:
    return PAGE.is_file() and f"Sources: `{digest()}`" in PAGE.read_text(encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/kernels.md is stale; write nothing")
    if parser.parse_args().check:
        print("docs/kernels.md is current" if is_current() else "docs/kernels.md is stale: run scripts/kernel_table.py")
        return 0 if is_current() else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
