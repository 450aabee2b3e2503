"""Runs CUDA kernels with faults: NVRTC compiles the changed source in memory, probes judge what the kernel gives.

Workers are forked from a process that has imported everything and touched no device. Each takes one fault after
another; one that dies of its fault (an illegal address) or hangs in it is replaced. A fault whose machine code is that
of the right source, in every kernel that the probes compile, is told apart from one that only passes them.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .faults import Fault

HANG = 60.0
"""Seconds without an answer after which a worker counts as hung."""
START = 120.0
"""Seconds that the first answer of a worker may take: it compiles what the right source gives."""
ENDS = ("survived", "killed", "crashed", "hung", "same code", "does not compile", "not run")


def run(root: Path, wanted: list[Fault], workers: int, limit: float) -> dict[str, list[str]]:
    """How each fault ended, by name of the end."""
    os.environ["RMSNORM_PATCH_CACHE_DIR"] = tempfile.mkdtemp(prefix="mutants-")
    sys.path[:0] = [str(root), str(root / "scripts")]
    import torch._dynamo  # noqa: F401
    from benchlib import kernel_cases  # noqa: F401

    found: dict[str, list[str]] = {end: [] for end in ENDS}
    waiting, end = list(reversed(wanted)), time.monotonic() + limit
    team: dict[Any, _Worker] = {}
    while (waiting and time.monotonic() < end) or any(w.fault for w in team.values()):
        while waiting and time.monotonic() < end and len(team) < workers:
            worker = _Worker(root)
            team[worker.pipe] = worker
            worker.give(waiting.pop())
        for pipe in multiprocessing.connection.wait(list(team), timeout=1.0):
            worker = team[pipe]
            try:
                how = pipe.recv()
            except EOFError:
                how = "crashed"
            _note(found, worker, how)
            if how == "crashed" or not waiting or time.monotonic() > end:
                team.pop(pipe).end()
            else:
                worker.give(waiting.pop())
        for pipe, worker in list(team.items()):
            if worker.fault and time.monotonic() > worker.patience:
                _note(found, worker, "hung")
                team.pop(pipe).end()
    found["not run"] = [fault.named() for fault in waiting]
    return found


def _note(found: dict[str, list[str]], worker: _Worker, how: str) -> None:
    if worker.fault is not None:
        found[how.partition(":")[0]].append(worker.fault.named())
        print(f"{how}: {worker.fault.named()}", flush=True)
    worker.fault = None


class _Worker:
    """A forked process and the fault that it is at."""

    def __init__(self, root: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(root, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.fault: Fault | None = None
        self.patience, self.first = 0.0, True

    def give(self, fault: Fault) -> None:
        self.fault = fault
        self.patience = time.monotonic() + (START if self.first else HANG)
        self.first = False
        self.pipe.send(fault)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(root: Path, pipe: Any) -> None:
    """Of a worker: answers each fault with how it ended."""
    compiled = _Compiled(root)
    while True:
        try:
            fault = pipe.recv()
        except EOFError:
            return
        pipe.send(_ended(compiled, fault))


def _ended(compiled: _Compiled, fault: Fault) -> str:
    from rmsnorm_patch.errors import KernelBuildError

    name = Path(fault.file).name
    files = [name] if name.endswith(".cu") else sorted(file for file in compiled.texts if file.endswith(".cu"))
    same = True
    for file in files:
        for probe in _probes(file):
            right = compiled.codes(probe, file, None)
            try:
                wrong = probe.fault(compiled, fault)
            except KernelBuildError as error:
                return f"does not compile: {str(error)[:80]!r}"
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                return "crashed" if "CUDA" in text or "launch" in text else f"killed: {text[:80]!r}"
            if wrong:
                return f"killed: {wrong[:80]!r}"
            same = same and compiled.last == right
    return "same code" if same else "survived"


class _Compiled:
    """Kernels of the right source or of a fault: what is bound is dropped when that changes."""

    def __init__(self, root: Path) -> None:
        from rmsnorm_patch.backends.cuda import arguments, jit, kernel_set

        self.folder = root / "kernels" / "cuda"
        self.right, self.arguments, self.fault = jit.source_of, arguments, None
        self.texts = {path.name: path.read_text() for path in self.folder.glob("*.cu*")}
        self.known: dict[Any, dict[Any, str]] = {}
        self.last: dict[Any, str] = {}
        jit.source_of = self.source_of  # type: ignore[assignment]
        inherited, configs_for = jit.machine_code, kernel_set.configs_for

        def machine_code(build: Any) -> bytes:
            code = inherited(build)
            self.last[build] = hashlib.sha256(code).hexdigest()
            return code

        def one_config(op: Any, dtype: Any, n: int, index: int) -> Any:
            """The schedule of the probe's row count alone, for every one: a compilation in place of several."""
            configs = configs_for(op, dtype, n, index)
            serving = [c for c in configs if c.m[0] <= self.rows <= c.m[1]][:1]
            return tuple(replace(c, m=(configs[0].m[0], configs[-1].m[1])) for c in serving) or configs

        jit.machine_code, kernel_set.configs_for = machine_code, one_config  # type: ignore[assignment]
        self.rows = 1

    def source_of(self, name: str) -> Any:
        from rmsnorm_patch.backends.cuda.jit import Source

        if self.fault is None:
            return self.right(name)
        texts = dict(self.texts)
        changed = Path(self.fault.file).name
        texts[changed] = self.fault.applied(texts[changed])
        headers = {file: text for file, text in texts.items() if file.endswith(".cuh")}
        arguments = self.arguments.declared(name, texts[name], headers)
        digest = hashlib.sha256(repr((name, sorted(texts.items()))).encode()).hexdigest()
        return Source(f"{texts[name]}\n{arguments.assertions()}", headers, digest, arguments)

    def use(self, fault: Fault | None, rows: int) -> None:
        from rmsnorm_patch.backends import bindings
        from rmsnorm_patch.backends.cuda import cache, kernel_set

        self.fault, self.rows, self.last = fault, rows, {}
        kernel_set._function.cache_clear()
        cache.forget()
        bindings.forget()

    def codes(self, probe: Probe, file: str, fault: Fault | None) -> dict[Any, str]:
        """Digests of the machine code that a probe of the right source compiles; the probe must find it right."""
        if probe not in self.known:
            wrong = probe.fault(self, None)
            assert not wrong, f"{file}: the right source fails {probe}: {wrong}"
            self.known[probe] = self.last
        return self.known[probe]


class Probe:
    """One judged call. cases: of `benchlib.kernel_cases`, or a function that says what is wrong."""

    def __init__(self, rows: int, call: Any, name: str) -> None:
        self.rows, self.call, self.name = rows, call, name

    def __repr__(self) -> str:
        return self.name

    def fault(self, compiled: _Compiled, fault: Fault | None) -> str:
        import torch

        compiled.use(fault, self.rows)
        wrong: str = self.call()
        torch.cuda.synchronize()
        return wrong


_MADE: dict[str, list[Probe]] = {}


def _probes(file: str) -> list[Probe]:
    """Probes whose kernels come from this file, the quickest to fail first."""
    if file not in _MADE:
        _MADE[file] = list(MAKERS[file]())
    return _MADE[file]


def _norms(long: bool) -> Iterator[Probe]:
    """Every axis that the kernels are compiled for, and a length and row count of each regime."""
    from benchlib.kernel_cases import BF16, FP16, FP32, SPECS, Case, Variant, fault_in

    from rmsnorm_patch.numerics.spec import GEMMA, LLAMA

    fused, alone, in_place = "fused_add_rms_norm", "rms_norm", "fused_add_rms_norm_"
    weightless, offset, rounded, wide, width, group = SPECS[4:]
    table = [
        (fused, LLAMA, BF16, BF16, 4096, 600, "dense", "last columns"),
        (in_place, LLAMA, BF16, BF16, 5125, 5, "padded", ""),
        (alone, GEMMA, FP16, FP16, 111, 33, "dense", "nan"),
        (fused, LLAMA, FP32, FP32, 1024, 17, "dense", "zeros"),
        (fused, LLAMA, BF16, BF16, 4096, 2, "offset", ""),
        (fused, LLAMA, BF16, BF16, 8192, 3, "dense", "last columns"),
        (in_place, wide, FP16, FP16, 2880, 129, "dense", "last columns"),
        (alone, weightless, BF16, BF16, 64, 2100, "two levels", ""),
        (fused, offset, BF16, BF16, 768, 9, "two levels", "inf"),
        (alone, width, BF16, BF16, 769, 9, "dense", ""),
        (alone, group, BF16, BF16, 1024, 9, "dense", ""),
        (fused, rounded, BF16, FP32, 2052, 100, "padded", ""),
        (in_place, LLAMA, BF16, BF16, 16384, 40, "dense", "last columns"),
        (alone, LLAMA, FP16, FP16, 7, 257, "offset", ""),
    ]
    far = [
        (fused, LLAMA, BF16, BF16, 65536, 5, "dense", "last columns"),
        (in_place, LLAMA, BF16, BF16, 131072, 2, "padded", "last columns"),
        (alone, GEMMA, FP16, FP16, 65536, 3, "dense", ""),
        (fused, wide, BF16, BF16, 131072, 3, "dense", "last columns"),
        (fused, LLAMA, FP32, FP32, 65536, 2, "dense", ""),
    ]
    for op, spec, dtype, weight_dtype, n, m, layout, special in far if long else table:
        case = Case(Variant(op, spec, dtype, weight_dtype, n, layout), m, 1e-5, 1.0, special, 1)
        yield Probe(m, lambda case=case: fault_in(case, "cuda", "cuda"), case.named)


def _adds() -> Iterator[Probe]:
    """A norm, the add behind it and the norm of that sum, against the definition with the proof's own tolerance."""
    import torch

    from rmsnorm_patch.fused.norm_add.op import bind_norm_add, bind_norm_add_norm
    from rmsnorm_patch.numerics import reference
    from rmsnorm_patch.numerics.spec import GEMMA, LLAMA
    from rmsnorm_patch.numerics.tolerances import SITE
    from rmsnorm_patch.proof.difference import compare

    def call(m: int, n: int, spec: Any) -> str:
        torch.manual_seed(1)
        x, residual = (torch.randn(m, n, device="cuda").bfloat16() for _ in range(2))
        x[:, :-8] *= 1e-2  # energy in the last columns
        weight, following = (torch.rand(n, device="cuda").bfloat16() + 0.5 for _ in range(2))
        kept = x.clone(), residual.clone()
        normed, total = bind_norm_add_norm(spec, "cuda")(x, residual, weight, 1e-6, following, 1e-3)
        alone = bind_norm_add(spec, "cuda")(x, residual, weight, 1e-6)
        want_total = reference.rms_norm(x, weight, spec, 1e-6) + residual
        want = reference.rms_norm(total, following, spec, 1e-3)
        for got, wanted in ((normed, want), (total, want_total)):
            wrong = compare(got, wanted).violations(SITE[x.dtype], x.dtype)
            if wrong:
                return wrong[0]
        return _differ((alone, total), (x, kept[0]), (residual, kept[1]))

    for m, n, spec in ((33, 2304, GEMMA), (2, 4096, LLAMA), (600, 3584, GEMMA), (5, 16384, LLAMA), (130, 128, LLAMA)):
        yield Probe(m, lambda a=(m, n, spec): call(*a), f"norm and add {m} {n}")


def _differ(*pairs: tuple[Any, Any]) -> str:
    import torch

    bad = [i for i, (got, want) in enumerate(pairs) if not torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))]
    return f"results {bad} differ" if bad else ""


def _pairs() -> Iterator[Probe]:
    """Queries and keys in one launch, against the definition with the proof's own tolerance."""
    import torch

    from rmsnorm_patch.fused.query_key_norm import kernel
    from rmsnorm_patch.numerics import reference
    from rmsnorm_patch.numerics.spec import GEMMA, LLAMA
    from rmsnorm_patch.numerics.tolerances import SITE
    from rmsnorm_patch.proof.difference import compare

    def call(tokens: int, n: int, spec: Any) -> str:
        torch.manual_seed(1)
        heads = torch.randn(tokens, 48, n, device="cuda").bfloat16()
        weights = [torch.rand(n, device="cuda").bfloat16() + 0.5 for _ in range(2)]
        given = heads[:, :32], heads[:, 32:40]
        kept = heads.clone()
        results = kernel.bind_rms_norm_pair(spec)(*given, *weights, 1e-6)
        for got, x, weight in zip(results, given, weights, strict=True):
            wrong = compare(got, reference.rms_norm(x, weight, spec, 1e-6)).violations(SITE[x.dtype], x.dtype)
            if wrong:
                return wrong[0]
        return _differ((heads, kept))

    for tokens, n, spec in ((33, 128, LLAMA), (1, 128, GEMMA), (300, 64, LLAMA), (5, 256, LLAMA)):
        yield Probe(tokens * 40, lambda t=tokens, n=n, s=spec: call(t, n, s), f"pair {tokens} {n}")


def _partials() -> Iterator[Probe]:
    """Parts of a product, against their sum and the definition."""
    import torch

    from rmsnorm_patch.fused.linear_norm import kernel
    from rmsnorm_patch.numerics import reference
    from rmsnorm_patch.numerics.spec import LLAMA, NormSpec
    from rmsnorm_patch.numerics.tolerances import SITE
    from rmsnorm_patch.proof.difference import compare

    wide = NormSpec(round_before_weight="none", output="input", sum="fp32")

    def call(m: int, n: int, parts: int, spec: Any) -> str:
        torch.manual_seed(1)
        pieces = torch.randn(parts, m, n, device="cuda")
        padded, weight = torch.randn(m + 1, n, device="cuda").bfloat16(), torch.rand(n, device="cuda").bfloat16() + 0.5
        behind, total = padded[m].clone(), pieces[0]
        for piece in pieces[1:]:
            total = total + piece
        want, summed = reference.fused_add_rms_norm(total.bfloat16(), padded[:m].clone(), weight, spec, 1e-6)
        normed = torch.full((m + 1, n), float("nan"), device="cuda").bfloat16()
        kernel.bound(spec, parts)(pieces, padded[:m], weight, 1e-6, normed[:m])
        wrong = compare(normed[:m], want).violations(SITE[want.dtype], want.dtype)
        if wrong or not bool(normed[m].isnan().all()):
            return "".join(wrong) or "a row too many"
        return _differ((padded[:m], summed), (padded[m], behind))

    for m, n, parts, spec in ((5, 4096, 2, LLAMA), (33, 4096, 3, wide), (1, 2048, 8, LLAMA), (16, 8192, 4, wide)):
        yield Probe(m, lambda a=(m, n, parts, spec): call(*a), f"parts {m} {n} {parts}")


def _quantised() -> Iterator[Probe]:
    """Quantised rows, to the bit of quantising what the definition gives where its norm agrees to the bit."""
    import torch

    from rmsnorm_patch import ops
    from rmsnorm_patch.fused.norm_quantised.op import quant_args
    from rmsnorm_patch.numerics.quantisation import QuantSpec, quantise
    from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, LLAMA

    def call(m: int, n: int, quant: Any, spec: Any, both: bool) -> str:
        torch.manual_seed(1)
        x, residual = (torch.randn(m, n, device="cuda").bfloat16() for _ in range(2))
        if m >= 10:
            x[0], x[3], residual[0] = 0, x[3] * 1e30, 0
            x[1, 5], x[2, 7] = float("inf"), float("nan")
        weight = torch.rand(n, device="cuda").bfloat16() + 0.5
        scale = torch.tensor([0.037], device="cuda") if quant.scheme == "fp8_static" else None
        wanted, total = ops.bind_fused_add_rms_norm(spec, "cuda")(x, residual, weight, 1e-6)
        values = wanted
        if quant.value != "rounded":
            wide = replace(spec, output="promote")
            values = ops.bind_fused_add_rms_norm(wide, "cuda")(x, residual, weight.float(), 1e-6)[0]
        want, want_scales = quantise(values, quant, scale)
        kept = residual.clone()
        rest = (weight, scale, quant.scheme, 1e-6, *ops.spec_args(spec, "cuda"), *quant_args(quant, both))
        found, scales, second = torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, kept, *rest)
        pairs = [(kept, total), (found.view(torch.uint8), want.view(torch.uint8)), (scales, want_scales)]
        return _differ(*pairs, *([(second, wanted)] if both else ()))

    for m, n, quant, spec, both in (
        (17, 4096, QuantSpec("fp8_token"), LLAMA, True),
        (300, 2880, QuantSpec("fp8_static"), LLAMA, False),
        (33, 4096, QuantSpec("fp8_block", "rounded", "separate", "tma_aligned", True), LLAMA, False),
        (100, 1000, QuantSpec("int8_token"), LLAMA, True),
        (3, 8192, QuantSpec("fp8_block", "fp32", "native", "column_major", True), FP32_WEIGHT_MULTIPLY, False),
        (33, 4096, QuantSpec("int8_token", "fp32", "separate"), FP32_WEIGHT_MULTIPLY, False),
    ):
        yield Probe(m, lambda a=(m, n, quant, spec, both): call(*a), f"quantised {m} {n} {quant}")


MAKERS: dict[str, Callable[[], Iterator[Probe]]] = {
    "rms_norm_rows.cu": lambda: _norms(long=False),
    "rms_norm_stream.cu": lambda: _norms(long=True),
    "rms_norm_pair.cu": _pairs,
    "rms_norm_partials.cu": _partials,
    "rms_norm_quantised.cu": _quantised,
    "rms_norm_add.cu": _adds,
}
"""Kernel file -> its probes."""
