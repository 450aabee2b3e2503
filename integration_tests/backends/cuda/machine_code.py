"""What the tests of machine code share: kernels compiled for GPUs that are not here, and read together."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rmsnorm_patch.backends.cuda import jit, nvrtc
from rmsnorm_patch.fused.norm_add import kernel as norm_add_kernel
from rmsnorm_patch.numerics.spec import NormSpec

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
