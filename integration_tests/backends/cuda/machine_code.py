"""What the tests of machine code share: kernels compiled for GPUs that are not here, and read together."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rmsnorm_patch.backends.cuda import jit, nvrtc, schedules
from rmsnorm_patch.fused.gated_norm import kernel as gated_norm_kernel
from rmsnorm_patch.fused.norm_add import kernel as norm_add_kernel
from rmsnorm_patch.fused.norm_quantised import kernel as norm_quantised_kernel
from rmsnorm_patch.fused.silu_quantised import kernel as silu_kernel
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.spec import LLAMA, NormSpec

pytest.importorskip("triton")
if nvrtc.find() is None:
    pytest.skip("NVRTC is not installed", allow_module_level=True)

_PATH = Path(__file__).parents[3] / "scripts" / "kernel_table.py"
_SPEC = importlib.util.spec_from_file_location("kernel_table", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
kernel_table = importlib.util.module_from_spec(_SPEC)
sys.modules["kernel_table"] = kernel_table
_SPEC.loader.exec_module(kernel_table)

sys.path.insert(0, str(Path(__file__).parents[2]))  # `kept`: test folders are not packages
from kept import kept_folder  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FUSED, PLAIN, PARTIALS = "fused_add_rms_norm", "rms_norm", "rms_norm_partials"
ADDING = (FUSED, PARTIALS, norm_add_kernel.OP)
ARCHS = (89, 90, 100, 103, 120)
FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")

SILU = {silu_kernel.WHOLE: QuantSpec("fp8_token"), silu_kernel.PARTS: QuantSpec("fp8_static")}

FORMS = pytest.mark.parametrize("form", ["short", pytest.param("long", marks=[pytest.mark.long, pytest.mark.slow])])


def drawn(form, choices, *of):
    """All of the choices in the long form; in the short one that is drawn by what it is chosen for."""
    return choices if form == "long" else random.Random(" ".join(map(str, of))).sample(choices, 1)


_KNOWN: dict[jit.Build, object] = {}
_compile_now = nvrtc.compile_source


def compile_source(name: str, source: str, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
    """As NVRTC's, which is asked once for each text: what it made stays with the environment, for all workers."""
    asked = repr((nvrtc.version(), name, source, sorted(headers.items()), options))
    kept = kept_folder("cuda") / hashlib.sha256(asked.encode()).hexdigest()
    if not kept.exists():
        made = kept.with_suffix(f".{os.getpid()}")
        made.write_bytes(_compile_now(name, source, headers, options))
        made.rename(kept)
    return kept.read_bytes()


def read(builds: Iterable[jit.Build]):
    """Build -> its machine code. The disassembler takes longer to start than to read hundreds of kernels: a test that
    shares kernels or an architecture with its neighbours asks for theirs too, and they find them here."""
    wanted = list(builds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "compile_source", compile_source)
        _KNOWN.update(kernel_table.machine_code(build for build in wanted if build not in _KNOWN))
    return {build: _KNOWN[build] for build in wanted}


def in_parts(config, parts):
    return replace(config, defines=(*config.defines, ("PARTIALS", parts)))


def check(config, machine, arch):
    assert not machine.spills, (config, machine)
    assert machine.waits == (1 if arch >= 90 else 0)
    assert machine.loads_before_wait == 0, "something is read before the dependency wait"


def every_schedule(arch):
    """(configuration, op, columns, dtype) of every rule of the registry, at the shortest row that it serves: also those
    that another rule is preferred to there."""
    for kernel in schedules.registered_kernels():
        for rule in kernel.rules:
            fits = all(low <= arch <= high for low, high in (kernel.capability, rule.capability))
            for x in (BF16, FP32) if fits else ():
                if x.itemsize not in rule.itemsize:
                    continue
                step = max(1, rule.row_bytes_multiple_of // x.itemsize)
                shortest = max(rule.n[0], -(-rule.row_bytes[0] // x.itemsize))
                n = -(-shortest // step) * step
                for op in kernel.ops:
                    writes_fp8 = op in (norm_quantised_kernel.OP, *SILU)
                    if writes_fp8 and arch < norm_quantised_kernel.FP8_CAPABILITY:
                        continue
                    if (
                        op != "fused_add_rms_norm_" and schedules.DTYPE_NAMES[x] in kernel.x_dtypes
                    ):  # in place: the same code
                        config = schedules.configure(kernel, rule, (1, 1), (), op, n, x.itemsize)
                        if op == norm_quantised_kernel.OP:  # one scheme of them
                            quant = QuantSpec("fp8_token")
                            (config,) = norm_quantised_kernel.schedules((config,), (config,), quant, True, True)
                        if op == norm_add_kernel.OP:
                            (config,) = norm_add_kernel.with_next((config,), True)
                        if op == gated_norm_kernel.OP:  # one order of the two
                            (config,) = gated_norm_kernel.schedules((config,), GateSpec("silu", "norm_first"), x)
                        if op in SILU:
                            (config,) = silu_kernel.schedules((config,), "rounded", SILU[op], True)
                        yield in_parts(config, 4) if op == PARTIALS else config, op, n, x


def built(config, op, n, arch, x=BF16):
    if op in SILU:
        return kernel_table.build(config, silu_kernel.SPEC, False, n, arch, x, None)
    return kernel_table.build(config, LLAMA, op in ADDING, n, arch, x, x)


def kernels_on(arch):
    kernels = schedules.registered_kernels()
    return {kernel.name for kernel in kernels if kernel.capability[0] <= arch <= kernel.capability[1]}


def ptx_of(build):
    text, headers, *_ = jit.source_of(build.config.source)
    options = (f"--gpu-architecture=compute_{build.arch}", *build.options())
    return compile_source(build.config.source, text, headers, options).decode()


@dataclass(frozen=True)
class SourceFault:
    """A generated fault of a kernel source. fault: of `scripts/mutation/faults.py`."""

    fault: Any

    @contextmanager
    def in_force(self):
        """`jit.source_of` gives sources with the fault."""
        name, right = Path(self.fault.file).name, jit.source_of

        def source_of(kernel):
            source = right(kernel)
            if name == kernel:
                return source._replace(text=self.fault.applied(source.text))
            headers = {
                file: self.fault.applied(text) if file == name else text for file, text in source.headers.items()
            }
            return source._replace(headers=headers)

        with mock.patch.object(jit, "source_of", source_of):
            yield

    def changed(self, builds):
        """Those of the builds that are others with the fault."""
        name = Path(self.fault.file).name
        right = {build: ptx_of(build) for build in builds if name.endswith(".cuh") or name == build.config.source}
        with self.in_force():
            return [build for build, ptx in right.items() if ptx_of(build) != ptx]


def faults_seen_by(test, script):
    """The faults of which `scripts/mutation/equivalent.toml` says that this test file sees them."""
    why, name = script("mutation.equivalents").equivalents(), Path(test).name
    found = [SourceFault(fault) for fault in script("mutants").faults("cuda") if name in why.get(fault.named(), "")]
    assert found
    return found
