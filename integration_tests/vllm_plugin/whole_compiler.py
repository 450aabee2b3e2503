"""A CPU engine that compiles as one on a GPU does: pieces, vLLM's manager of graph passes, Inductor.

vLLM's CPU platform traces a model once and hands it to Inductor without its own passes. `install` gives the mode back,
and says to our decision that the device is a GPU on which products and norms are joined. Everything else is real: the
split into pieces, the passes, functionalization, Inductor's choice of what is written in place, both caches.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

import torch

FUSIONS = ("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant", "fuse_allreduce_rms")
"""Passes that the CPU wheel has no classes for."""
_STAND_INS: list[torch.library.Library] = []


def install() -> None:
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        compilation = config.compilation_config
        compiles = compilation.mode == CompilationMode.VLLM_COMPILE
        original(cls, config)
        if compiles:
            compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
            compilation.ir_enable_torch_wrap = True
            compilation.compile_sizes = []
            for fusion in FUSIONS:
                setattr(compilation.pass_config, fusion, False)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    _name_missing_ops()
    _multiply_as_torch_does()
    _adapt_by_an_op()
    _pretend_a_gpu()


def _multiply_as_torch_does() -> None:
    """What multiplies on a CPU depends on which it is; a graph of a GPU holds torch's own products."""
    from vllm.model_executor.layers import utils

    utils.check_cpu_sgl_kernel = lambda *_: False
    utils.ops._supports_onednn = False


def _adapt_by_an_op() -> None:
    """A GPU's LoRA is an op that writes into the product in front of it. A CPU's is Python, and a trace without an
    adapter has nothing of it."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    add, make = PunicaWrapperCPU.add_lora_linear, PunicaWrapperCPU.__init__
    wrappers: list[Any] = []

    def numbered(self: Any, *args: Any, **named: Any) -> None:
        make(self, *args, **named)
        self.number = len(wrappers)
        wrappers.append(self)

    @torch.library.custom_op("rmsnorm_patch_tests::add_lora", mutates_args={"y"})
    def add_lora(
        y: torch.Tensor,
        x: torch.Tensor,
        a: list[torch.Tensor],
        b: list[torch.Tensor],
        scale: float,
        slices: list[int],
        wrapper: int,
    ) -> None:
        add(wrappers[wrapper], y, x, tuple(a), tuple(b), scale, tuple(slices))

    def add_lora_linear(
        self: Any, y: torch.Tensor, x: torch.Tensor, a: Any, b: Any, scale: float, slices: Any, **_: Any
    ) -> None:
        add_lora(y, x, list(a), list(b), scale, list(slices), self.number)

    PunicaWrapperCPU.__init__ = numbered
    PunicaWrapperCPU.add_lora_linear = add_lora_linear


def _name_missing_ops() -> None:
    """FixFunctionalizationPass compares each functional call with ops that only a GPU's wheel has."""
    from vllm.compilation.passes.utility import fix_functionalization

    name_ops_in(inspect.getsource(fix_functionalization))


def name_ops_in(source: str) -> None:
    """Each of vLLM's CUDA ops that the text names and this wheel does not have gets a name, and nothing behind it."""
    from vllm import _custom_ops  # noqa: F401  it looks for ops, and must not find these
    from vllm.platforms import current_platform

    current_platform.import_kernels()  # the wheel's own ops come first
    _STAND_INS.append(torch.library.Library("_C", "FRAGMENT"))
    for name, overload in set(re.findall(r"torch\.ops\._C\.(\w+)\.(default|out)", source)):
        if not hasattr(torch.ops._C, name):
            _STAND_INS[-1].define(f"{name}{'' if overload == 'default' else '.out'}(Tensor x) -> ()")


def _pretend_a_gpu() -> None:
    from rmsnorm_patch.vllm_plugin import decision, hooks

    facts_of = decision.facts_of

    def facts_of_a_gpu(*args: Any) -> Any:
        return replace(facts_of(*args), device_type="cuda", capability=90, captures=True)

    decision.facts_of = hooks.facts_of = facts_of_a_gpu


def hide_ir() -> None:
    """vLLM without what a plugin may do with its IR: no provider can be added."""
    import vllm.kernels  # noqa: F401  vLLM's own providers are there
    from vllm.ir.op import IrOp

    del IrOp.register_impl
