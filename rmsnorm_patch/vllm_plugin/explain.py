"""What an engine would do with each norm of a model: `python -m rmsnorm_patch.vllm_plugin.explain MODEL [ARGUMENTS]`.

The arguments are those of `vllm serve`. The engine is configured with them and its model built without weights; then
each norm is called with tensors that have no data, up to where vLLM chooses a provider. Prints one JSON document. It
is a process of its own (`rmsnorm-patch env --vllm-model` starts it), because vLLM keeps global state.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import Any

import torch

from . import calls
from .decision import SPECS, Decision, decision_for


class _Chosen(Exception):
    """Ends a call at the moment when its provider is known."""


def explain(arguments: list[str]) -> dict[str, Any]:
    """decision, and for each norm its path, class, columns and what serves it; may raise what vLLM raises."""
    config = _configure(arguments)
    decision = decision_for(config)
    if decision.route != "none" and not _is_loaded(decision.route):
        decision = Decision("none", "", "vLLM did not load the plugin: VLLM_PLUGINS, or no installed package names it")
    norms = []
    for path, norm in _model(config).named_modules():
        if "RMSNorm" in type(norm).__name__ and not list(norm.children()):
            columns = next((p.shape[-1] for p in norm.parameters()), getattr(norm, "hidden_size", 0))
            described = {"path": path, "class": type(norm).__name__, "columns": columns}
            norms.append({**described, "served_by": _serving(norm, columns, config, decision)})
    compiled = config.compilation_config
    return {
        "route": decision.route,
        "provider": decision.provider,
        "reason": decision.reason
        + (f"; numerics of transformers refused: {decision.refused}" if decision.refused else ""),
        "compile_mode": getattr(compiled.mode, "name", str(compiled.mode)),
        "norms": norms,
    }


def _configure(arguments: list[str]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    model, *rest = arguments
    return EngineArgs.from_cli_args(parser.parse_args(["--model", model, *rest])).create_engine_config()


def _is_loaded(route: str) -> bool:
    """Whether vLLM called `register`: it does while it reads its arguments."""
    if route == "oot":
        from vllm.model_executor.custom_op import op_registry_oot

        return bool(getattr(op_registry_oot.get("RMSNorm"), "is_rmsnorm_patch", False))
    from vllm import ir

    return all(provider in ir.ops.rms_norm.impls for provider in SPECS)


def _model(config: Any) -> torch.nn.Module:
    """vLLM's model on the meta device, as the one rank of a group of its own."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    config.parallel_config.tensor_parallel_size = config.parallel_config.world_size = 1
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        initialize_model_parallel()
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            return initialize_model(config)


def _serving(norm: torch.nn.Module, columns: int, config: Any, decision: Decision) -> str:
    if decision.route == "none":
        return "vLLM's own norm"
    over_heads = columns == config.model_config.get_head_size() != config.model_config.get_hidden_size()
    shape = (2, 3, columns) if over_heads else (2, columns)
    x = torch.empty(shape, dtype=config.model_config.dtype, device="meta")
    on_class = decision.route == "oot" or getattr(norm, "is_rmsnorm_patch", False)
    first = None if on_class else config.kernel_config.ir_op_priority.rms_norm[0]
    if first is not None and first not in SPECS:
        return f"vLLM's own norm: the IR priority was set to begin with {first!r}"
    provider = getattr(norm, "_provider", "") if on_class else _chosen_provider(norm, x, config)
    if provider in SPECS and not calls.belongs_to_the_compiler(decision.provider, x):
        return f"rmsnorm_patch ({provider})"
    if over_heads and decision.provider == "rmsnorm_patch":
        return "the compiler: a norm over heads is fused with its neighbours"
    return "vLLM's own norm: its class, dtype or weight is not served"


def _chosen_provider(norm: torch.nn.Module, x: torch.Tensor, config: Any) -> str:
    """The provider of the IR op that the norm calls; "" if it calls none."""
    from vllm import ir

    with config.kernel_config.ir_op_priority.set_priority(), ir.enable_torch_wrap(False), _stopping() as seen:
        try:
            norm.forward_native(x)  # type: ignore[operator]
        except Exception as error:
            if not isinstance(error, _Chosen):
                return ""
    return seen[0] if seen else ""


@contextmanager
def _stopping() -> Any:
    from vllm.ir.op import IrOp

    dispatch, seen = IrOp.dispatch, []

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(dispatch(self, *args, **kwargs).provider)
        raise _Chosen

    IrOp.dispatch = stop
    try:
        yield seen
    finally:
        IrOp.dispatch = dispatch


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not part of the document
    try:
        document = explain(sys.argv[1:])
    except Exception as error:
        document = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(document), file=answers, flush=True)
    os._exit(1 if "error" in document else 0)  # vLLM's threads and process groups need no shutdown
