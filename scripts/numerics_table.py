"""Who rounds where in an RMSNorm, and how many elements of a bf16 row that moves: the tables of docs/numerics.md.

    python scripts/numerics_table.py           # write them into the page
    python scripts/numerics_table.py --check   # exit 1 if the page has others

A library is described by a NormSpec. Where it runs on a CPU it is run, and its row says in how many elements of its own
result it is not what the description computes. Triton's kernels run in Triton's interpreter. The others are described
by their source, which the table names with the release or the commit of it that was read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rmsnorm_patch.numerics import reference  # noqa: E402
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, T5, NormSpec  # noqa: E402

PAGE = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- written by scripts/numerics_table.py -->", "<!-- end -->"
COLUMNS, EPS = 4096, 1e-6

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Library:
    """spec: what it computes for x + residual. run: (x, residual, weight) -> normed, None where it needs a GPU. source:
    where that can be read; dtype: of the rows that it is run on; held: what stands for a run elsewhere."""

    name: str
    spec: NormSpec
    source: str
    run: Run | None = None
    dtype: torch.dtype = torch.bfloat16
    held: str = ""


def operands(adds_one: bool, dtype: torch.dtype = torch.bfloat16) -> Operands:
    """One row, its residual and a weight."""
    generator = torch.Generator().manual_seed(20260301)
    x, residual = torch.randn(2, 1, COLUMNS, generator=generator).to(dtype)
    weight = torch.rand(COLUMNS, generator=generator) + (-0.5 if adds_one else 0.5)
    return x, residual, weight.to(dtype)


def described(spec: NormSpec, given: Operands) -> torch.Tensor:
    return reference.fused_add_rms_norm(*given, spec, EPS)[0]


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a != b).sum())


def module(path: str, name: str) -> Run:
    """A norm module of transformers, behind an add of its model."""

    def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from importlib import import_module

        made = getattr(import_module(f"transformers.models.{path}"), name)(COLUMNS, eps=EPS)
        made.weight.data = weight
        with torch.no_grad():
            result: torch.Tensor = made(residual + x)
        return result

    return run


def functional(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x + residual, (COLUMNS,), weight, EPS)


class Scalar(float):
    """A number as a compiled kernel gets it; the interpreter passes Python's, which cannot be cast."""

    def to(self, dtype: Any) -> Scalar:
        return self


def liger(mode: str, offset: float) -> Run:
    """Liger's fused kernel. The interpreter has no libdevice, whose rsqrt the kernel would call, and adds bf16 as
    integers: such a library is run on fp16 rows."""

    def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        import triton.language as tl
        from liger_kernel.ops import fused_add_rms_norm as source

        kernel: Any = source._fused_add_rms_norm_forward_kernel
        kernel.fn.__globals__["rsqrt"] = lambda value: tl.rsqrt(value)  # looked up while a kernel is interpreted
        normed, total, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(1)
        casting = getattr(source, f"_CASTING_MODE_{mode}")
        rows = (normed, COLUMNS, total, COLUMNS, x, COLUMNS, residual, COLUMNS, weight, 1, rstd, 1)
        kernel[(1,)](*rows, COLUMNS, Scalar(EPS), Scalar(offset), casting_mode=casting, BLOCK_SIZE=COLUMNS)
        return normed

    return run


ON_A_GPU = "run beside vLLM by a GPU test"
FLASHINFER, SGLANG = "by its source at 09928cf, not run", "by its source at 000fc1a, not run"
OF_FLASHINFER = "calls FlashInfer's kernel, by its source"
TENSORRT_LLM = "`_torch/modules/rms_norm.py`"
FP32_SUM = replace(FP32_WEIGHT_MULTIPLY, sum="fp32")
LIBRARIES = (
    Library(
        "transformers: Llama, Mistral, Qwen 2 and 3, DeepSeek, ...",
        LLAMA,
        "`models/llama`",
        module("llama.modeling_llama", "LlamaRMSNorm"),
    ),
    Library("transformers: T5", T5, "`models/t5`", module("t5.modeling_t5", "T5LayerNorm")),
    Library(
        "transformers: Olmo 2, GptOss",
        FP32_WEIGHT_MULTIPLY,
        "`models/olmo2`",
        module("olmo2.modeling_olmo2", "Olmo2RMSNorm"),
    ),
    Library("torch: `F.rms_norm`", FP32_WEIGHT_MULTIPLY, "`aten/src/ATen/native/layer_norm.cpp`", functional),
    Library("vLLM: C++ op (eager on a GPU)", FP32_WEIGHT_MULTIPLY, "`csrc/layernorm_kernels.cu`", held=ON_A_GPU),
    Library(
        "vLLM: batch-invariant (Triton; with a residual the C++ op)",
        FP32_WEIGHT_MULTIPLY,
        "`model_executor/determinism/batch_invariant.py`",
        held="by its source in 0.32, not run",
    ),
    Library("vLLM: native, compiled (Inductor's fusion)", FP32_SUM, "`vllm/ir/ops/layernorm.py`", held=ON_A_GPU),
    Library(
        "vLLM: native IR, uncompiled",
        NormSpec(round_before_weight="weight", output="input", sum="fp32"),
        "`vllm/ir/ops/layernorm.py`",
        held="run beside vLLM by a test: 0",
    ),
    Library("FlashInfer", FP32_SUM, "`include/flashinfer/norm.cuh`", held=FLASHINFER),
    Library("SGLang: native", FP32_SUM, "`srt/layers/layernorm.py`", held=SGLANG),
    Library("SGLang: CUDA", FP32_SUM, "`sgl-kernel/csrc/elementwise`", held=f"{OF_FLASHINFER} (48c848a)"),
    Library("quack", FP32_SUM, "`quack/rmsnorm.py`", held="by its source at 05bce72, not run"),
    Library("TensorRT-LLM: with FlashInfer", FP32_SUM, TENSORRT_LLM, held=f"{OF_FLASHINFER} (0419019)"),
    Library(
        "TensorRT-LLM: without", replace(LLAMA, sum="fp32"), TENSORRT_LLM, held="by its source at 0419019, not run"
    ),
    Library("Liger: `llama`", LLAMA, "`ops/fused_add_rms_norm.py`", liger("LLAMA", 0.0), torch.float16),
    Library(
        "transformers: Gemma 1 to 3, Qwen3-Next",
        GEMMA,
        "`models/gemma3`",
        module("gemma3.modeling_gemma3", "Gemma3RMSNorm"),
    ),
    Library(
        "transformers: MuseSpark",
        replace(GEMMA, weight_offset="weight_dtype"),
        "`models/muse_spark`",
        module("muse_spark.modeling_muse_spark", "MuseSparkTextCenteredRMSNorm"),
    ),
    Library(
        "vLLM: `GemmaRMSNorm`", replace(GEMMA, sum="fp32"), "`layers/layernorm.py`", held="run beside vLLM by a test: 0"
    ),
    Library("SGLang: `GemmaRMSNorm`, native", GEMMA, "`srt/layers/layernorm.py`", held=SGLANG),
    Library("FlashInfer: `GemmaRMSNorm`", replace(GEMMA, sum="fp32"), "`include/flashinfer/norm.cuh`", held=FLASHINFER),
    Library("Liger: `gemma`", GEMMA, "`ops/fused_add_rms_norm.py`", liger("GEMMA", 1.0), torch.float16),
)

ROUNDS = {"input": "to the rows' dtype", "weight": "to the weight's, if a half type", "none": "no"}
OFFSETS = {"none": "", "fp32": "in fp32", "weight_dtype": "in the weight's dtype"}


def libraries_table() -> list[str]:
    lines = [
        "| library | rounds `x * rstd` | `1 + w` | the norm reads | run here: elements unlike this row | source |",
        "|---|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        spec = library.spec
        given = operands(spec.weight_offset != "none", library.dtype)
        checked = library.held
        if library.run is not None:
            checked = str(differing(library.run(*given), described(spec, given)))
            checked += " (fp16)" if library.dtype == torch.float16 else ""
        read = "the rounded sum" if spec.sum == "rounded" else "the fp32 sum"
        cells = (library.name, ROUNDS[spec.round_before_weight], OFFSETS[spec.weight_offset], read, checked)
        lines.append(f"| {' | '.join((*cells, library.source))} |")
    return lines


def distances_table(specs: dict[str, NormSpec]) -> list[str]:
    """How many of a row's elements differ between each two, and from the exact value rounded once."""
    lines = [f"| of {COLUMNS} | {' | '.join(specs)} | exact |", "|---|" + "--:|" * (len(specs) + 1)]
    for name, spec in specs.items():
        given = operands(spec.weight_offset != "none")
        x, residual, weight = given
        exact = reference.rms_norm_fp64(x.double() + residual.double(), weight, spec, EPS).to(x.dtype)
        mine = described(spec, given)
        counts = [differing(mine, described(other, given)) for other in specs.values()]
        lines.append(f"| {' | '.join((name, *map(str, counts), str(differing(mine, exact))))} |")
    return lines


PLAIN = {
    "before, rounded sum": LLAMA,
    "once, rounded sum": FP32_WEIGHT_MULTIPLY,
    "once, fp32 sum": FP32_SUM,
    "before, fp32 sum": replace(LLAMA, sum="fp32"),
}
WITH_ONE = {
    "fp32 `1 + w`, rounded sum": GEMMA,
    "fp32 `1 + w`, fp32 sum": replace(GEMMA, sum="fp32"),
    "rounded `1 + w`, rounded sum": replace(GEMMA, weight_offset="weight_dtype"),
}


def tables() -> str:
    """What stands between the two marks of the page."""
    parts = libraries_table(), distances_table(PLAIN), distances_table(WITH_ONE)
    return "\n\n".join("\n".join(lines) for lines in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    new = f"{head}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"
    if options.check:
        print("as written" if new == text else f"{PAGE.name} has other tables: run scripts/numerics_table.py")
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
