"""Where the plugin takes hold of vLLM: the default IR priority, the compile-cache key, the log line, the start.

Each hook wraps one function once per process, keeps its signature and calls the original.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ..backends.cuda import nvrtc
from ..fused.linear_norm import splits as linear_norm_splits
from ..numerics.contract import FUNCTIONAL
from ..ops.dispatch import triton_installed
from . import batch_invariant, calls, counterparts, settings
from .decision import ALL_REDUCE, NORM_QUANT, SPECS, Decision, decide, decision_for, facts_of
from .log import logger, warn_once
from .passes import block_products, linear_norm, norm_add, norm_quantised, silu_quantised
from .wrapping import wrap_once

_LOGGED: set[tuple[int, str]] = set()
"""Process, what it said."""


def install() -> None:
    """All hooks that this vLLM offers."""
    from vllm.config import VllmConfig

    wrap_once(VllmConfig, "compute_hash", _compute_hash)
    if arg_utils := sys.modules.get("vllm.engine.arg_utils"):  # the process that configures the engine
        wrap_once(arg_utils.EngineArgs, "create_engine_config", _create_engine_config)
    if settings.asks_transformers():
        from vllm.model_executor.model_loader import BaseModelLoader

        for loader in (BaseModelLoader, *BaseModelLoader.__subclasses__()):  # some have a load_model of their own
            wrap_once(loader, "load_model", counterparts.wrap_load)


def install_priority(register_class: Callable[[], None]) -> None:
    """Put our provider first in the defaults of the platform; a user's own `--ir-op-priority` still comes before.
    register_class: what route "oot" needs of a process before it builds a model."""
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms import current_platform

    wrap_once(type(current_platform), "get_default_ir_op_priority", _default_priority)
    wrap_once(IrOpPriorityConfig, "set_default", lambda original: _set_default(original, register_class))


PASSES: tuple[Any, ...] = (
    block_products.NEEDED,
    block_products.PASS,
    norm_quantised.PASS,
    silu_quantised.PASS,
    norm_add.PASS,
    linear_norm,
)
"""In the order in which they run."""


def install_passes() -> None:
    """For workers, which compile: our passes run after those of vLLM's manager, which all of them hang on. They need
    nothing of what those leave, so the hook does not depend on vLLM's IR."""
    try:
        from vllm.compilation.passes.pass_manager import PostGradPassManager
    except ImportError as error:
        warn_once(f"norms stay apart from their neighbours: this vLLM keeps its graph passes elsewhere ({error})")
        return
    for name, wrapper in (("configure", "wrap_configure"), ("__call__", "wrap_call"), ("uuid", "wrap_uuid")):
        wrap_once(PostGradPassManager, name, _in_turn(*(getattr(one, wrapper) for one in PASSES)))
    if linear_norm.tell not in linear_norm_splits.on_found:
        linear_norm_splits.on_found.append(linear_norm.tell)


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def _in_turn(*wrappers: Wrapper) -> Wrapper:
    """One wrapper of several, the first of which is the innermost."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        for wrapper in wrappers:
            original = wrapper(original)
        return original

    return wrap


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings.check()  # a bad value stops the start here: vLLM swallows what a plugin raises in some processes
        return original(self, *args, **kwargs)

    return create_engine_config


def _default_priority(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_default_ir_op_priority(cls: Any, vllm_config: Any) -> Any:
        priority = original(cls, vllm_config)
        decision = decide(facts_of(vllm_config, tuple(priority.rms_norm)))
        if decision.apart:
            _turn_off(vllm_config, ALL_REDUCE)
        if decision.quantised:
            _turn_off(vllm_config, NORM_QUANT)
        if decision.route == "ir":
            for name in FUNCTIONAL:
                setattr(priority, name, [decision.provider, *getattr(priority, name)])
        return priority

    return get_default_ir_op_priority


def _turn_off(vllm_config: Any, name: str) -> None:
    """A pass of vLLM's that would take norms from us, where its being on is a default: behind all-reduces, or in front
    of quantisations. Whoever has turned it on keeps it."""
    passes = vllm_config.compilation_config.pass_config
    if getattr(passes, name, None) is None:
        setattr(passes, name, False)


def _set_default(original: Callable[..., Any], register_class: Callable[[], None]) -> Callable[..., Any]:
    def set_default(self: Any) -> None:
        original(self)
        install_passes()  # here, in the worker: it imports Inductor
        from vllm.config import get_current_vllm_config_or_none

        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None:
            _prepare_classes(decision_for(vllm_config), register_class)
        log(vllm_config, self)

    return set_default


def _prepare_classes(decision: Decision, register_class: Callable[[], None]) -> None:
    """Before the worker builds its model. A process may hold several engines: the first one's route was another one's
    perhaps, and then our class was not registered when the plugin was loaded."""
    if decision.route == "oot":
        try:
            register_class()
        except RuntimeError as error:
            warn_once(f"{error}; vLLM serves with its own norms")
    if batch_invariant.passes_by_ir(decision):
        from vllm.model_executor.layers.layernorm import RMSNorm

        wrap_once(RMSNorm, "forward_cuda", batch_invariant.wrap_forward)


def _compute_hash(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        key = original(self, *args, **kwargs)
        decision = decision_for(self)
        if decision.route == "none":
            return key
        ours = fingerprint(decision, linear_norm.splits_of(self, decision))
        return hashlib.sha256(f"{key} {ours}".encode()).hexdigest()[: len(key)]

    return compute_hash


def fingerprint(decision: Decision, splits: str) -> str:
    """What a compiled graph depends on and vLLM cannot see. The toolchain decides which norms are served at all."""
    toolchain = nvrtc.find() is not None, triton_installed()
    silu = decision.silu_quantised
    blocks = decision.needs_blocks, block_products.versions() if decision.blocks else None
    passes = decision.linear, splits, decision.quantised, decision.norm_add, silu, blocks
    what = f"{decision.route} {decision.provider} {decision.numerics} {passes}"
    return f"rmsnorm_patch {calls.VERSION} {what} {calls.forms()} {toolchain}"


def log(vllm_config: Any, priority: Any = None) -> None:
    """What was selected and why: a line for each worker, and one more where its next engine gets something else."""
    if vllm_config is None:
        return
    decision = decision_for(vllm_config)
    if decision.warning:
        warn_once(decision.reason + "; the engine serves with its own kernels")
        return
    text = str(decision)
    if decision.route == "ir" and priority is not None and priority.rms_norm[0] not in SPECS:
        text += f"; but the IR priority was set to begin with {priority.rms_norm[0]!r}, which comes first"
    if (said := (os.getpid(), text)) not in _LOGGED:
        _LOGGED.add(said)
        logger.info("rmsnorm_patch: worker %d: %s", *said)
