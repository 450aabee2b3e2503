"""The ops: `torch.ops.rmsnorm_patch.*` for graphs, and `bind_*` callables for eager code.

    rms_norm(x, weight?, eps, ...)                        -> normed
    fused_add_rms_norm(x, residual, weight?, eps, ...)    -> (normed, sum)
    fused_add_rms_norm_(x!, residual!, weight?, eps, ...) -> ()       residual <- sum, x <- normed

x, residual: [..., N], fp16, bf16 or fp32, any strides; weight: [N] or None. Results are contiguous whatever the
strides of the inputs (the kernels write rows one after another), so the fake implementations say the same.
`eps=None` means fp32's epsilon (as `NormSpec.eps`). A NormSpec travels as primitive arguments (`spec_args`).
`enable_pdl=False` launches plainly, `True` (in `bind_*` also `None`) as RMSNORM_PATCH_PDL says (`launch_mode`).

The ops are registered with `torch.library.Library.impl`, which costs an eager call less than half
of what `torch.library.custom_op` does. A bound callable skips the dispatcher altogether. Neither kernels nor ops have a
backward: under grad the patched modules use the original arithmetic, and so does a bound callable in a traced graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

from ..backends import launch_mode
from ..backends.names import BACKENDS, Backend
from ..errors import KernelBuildError, UnsupportedInput
from ..numerics import operands as validate
from ..numerics import reference
from ..numerics.spec import NormSpec

NAMESPACE = "rmsnorm_patch"
_SPEC = (
    "float? eps, str round_before_weight='input', str weight_offset='none', str output='promote', "
    "str sum='rounded', int? width=None, int? group=None, str backend='auto', "
    "bool enable_pdl=True"
)
SCHEMAS = {
    "rms_norm": f"(Tensor x, Tensor? weight, {_SPEC}) -> Tensor",
    "fused_add_rms_norm": f"(Tensor x, Tensor residual, Tensor? weight, {_SPEC}) -> (Tensor, Tensor)",
    "fused_add_rms_norm_": f"(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, {_SPEC}) -> ()",
}
CompileForm = Literal["op", "decomposed"]
COMPILE_VARIABLE = "RMSNORM_PATCH_COMPILE"

_is_compiling = torch.compiler.is_compiling
_BOUND: dict[tuple[str, NormSpec, str, bool], Bound] = {}


def compile_form(device_type: str) -> CompileForm:
    """What a bound callable becomes inside `torch.compile`: the opaque op, or its arithmetic for Inductor to fuse.

    CPU: "decomposed" (there is no kernel to keep, and Inductor fuses the arithmetic with its neighbours). CUDA: "op":
    the kernels keep the model's rounding, which Inductor's fusion drops (it carries bf16 values in fp32), and in
    decode they are faster than Inductor's. `RMSNORM_PATCH_COMPILE=op|decomposed` overrides.
    """
    forced = os.environ.get(COMPILE_VARIABLE, "")
    if forced not in ("", "op", "decomposed"):
        raise UnsupportedInput(COMPILE_VARIABLE, repr(forced), "'op', 'decomposed' or unset", "correct the variable")
    return "op" if (forced or ("op" if device_type == "cuda" else "decomposed")) == "op" else "decomposed"


def spec_args(
    spec: NormSpec, backend: str = "auto", enable_pdl: bool = True
) -> tuple[str, str, str, str, int | None, int | None, str, bool]:
    """The arguments of the ops after `eps`: those that describe `spec`, then how it is served."""
    return (
        spec.round_before_weight,
        spec.weight_offset,
        spec.output,
        spec.sum,
        spec.width,
        spec.group,
        backend,
        enable_pdl,
    )


def bind_rms_norm(spec: NormSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> Bound:
    """f(x, weight, eps) -> normed. UnsupportedInput for a value of RMSNORM_PATCH_PDL that is none."""
    return _bind("rms_norm", spec, backend, enable_pdl)


def bind_fused_add_rms_norm(spec: NormSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> Bound:
    """f(x, residual, weight, eps) -> (normed, sum). Errors as `bind_rms_norm`."""
    return _bind("fused_add_rms_norm", spec, backend, enable_pdl)


def bind_fused_add_rms_norm_(spec: NormSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> Bound:
    """f(x, residual, weight, eps) -> None; residual <- sum, x <- normed. Errors as `bind_rms_norm`."""
    return _bind("fused_add_rms_norm_", spec, backend, enable_pdl)


def _bind(op: str, spec: NormSpec, backend: str, enable_pdl: bool | None) -> Bound:
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}")
    key = (op, spec.variant, backend, launch_mode.dependent(enable_pdl))
    bound = _BOUND.get(key)
    if bound is None:
        bound = _BOUND.setdefault(key, Bound(*key))
    return bound


class Bound:
    """One op bound to a numerics variant and a backend; called as the op without the spec's arguments.

    An instance, not a function: held as a class attribute it does not turn into a method.
    """

    __slots__ = ("_args", "_device_call", "_reference", "_routes", "backend", "dependent", "op", "spec", "table")

    def __init__(self, op: str, spec: NormSpec, backend: str, dependent: bool) -> None:
        self.op = op
        self.spec = spec
        self.backend = backend
        self.dependent = dependent
        """Whether its kernels are launched dependently, on devices that know such launches."""
        self._args = spec_args(spec, backend, dependent)
        self._reference = _reference_function(op, spec)
        self._routes: dict[tuple[Any, ...], tuple[str, Callable[..., Any]]] = {}
        self._device_call: Callable[..., Any] | None = None
        """The CUDA backend's own callable once a call has been routed there: it knows what it serves, and says
        KernelBuildError to the rest, so that the usual call pays for no look-up here."""
        self.table: object | None = None
        """`cuda_backend.table`, from the same moment on."""

    def __call__(self, *args: Any) -> Any:
        if _is_compiling():
            return self._traced(*args)
        call = self._device_call
        if call is not None and args[0].is_cuda:
            try:
                return call(*args)
            except KernelBuildError:
                name, other = self._route(args[0], args[-2])
                if name == "cuda":
                    raise
                return other(*args)
        x = args[0]
        if self.backend == "reference" or (self.backend == "auto" and not x.is_cuda):
            return self._reference(*args)
        return self._route(x, args[-2])[1](*args)

    def _traced(self, *args: Any) -> Any:
        x, weight, eps = args[0], args[-2], args[-1]
        if self.op != "fused_add_rms_norm_" and (
            self.backend == "reference" or compile_form(x.device.type) == "decomposed" or _needs_grad(args)
        ):
            return self._reference(*args)
        if not self.spec.has_weight:
            weight = None
        return getattr(torch.ops.rmsnorm_patch, self.op).default(*args[:-2], weight, eps, *self._args)

    def backend_for(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> str:
        """ "reference", "triton" or "cuda": what a call with `x` runs (in eager mode)."""
        if self.backend == "reference" or (self.backend == "auto" and not x.is_cuda):
            return "reference"
        return self._route(x, weight)[0]

    def _route(self, x: torch.Tensor, weight: torch.Tensor | None) -> tuple[str, Callable[..., Any]]:
        """Choose for this (dtype, N, weight dtype, device), never by the number of rows: a row's result must not
        depend on its batch."""
        key = (x.dtype, x.shape[-1:], None if weight is None else weight.dtype, x.device)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._new_route(x, weight)
        return route

    def _new_route(self, x: torch.Tensor, weight: torch.Tensor | None) -> tuple[str, Callable[..., Any]]:
        validate.check_rms_norm(x, weight, self.spec, self.op)
        name = self.backend if self.backend != "auto" else _choose(self.op, self.spec, x, weight)
        if name == "triton":
            from ..backends.triton import backend as triton_backend

            return name, triton_backend.bind(self.op, self.spec, self.dependent)
        if name == "cuda":
            if not x.is_cuda:
                raise UnsupportedInput(
                    self.op, f"x on {x.device}", "CUDA tensors for backend='cuda'", "use backend='auto' or 'reference'"
                )
            from ..backends.cuda import backend as cuda_backend

            call = cuda_backend.bind(self.op, self.spec, self.dependent)  # type: ignore[arg-type]
            self._device_call = self._device_call or call
            self.table = cuda_backend.table(self.op, self.spec, self.dependent)  # type: ignore[arg-type]
            return name, self._device_call
        return name, self._reference

    def __repr__(self) -> str:
        plain = "" if self.dependent else ", enable_pdl=False"
        return f"Bound({self.op!r}, {self.spec!r}, backend={self.backend!r}{plain})"


def _needs_grad(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def _choose(op: str, spec: NormSpec, x: torch.Tensor, weight: torch.Tensor | None) -> str:
    from . import dispatch

    weight_dtype = None if weight is None else weight.dtype
    m = x.numel() // x.shape[-1]
    return dispatch.choose(op, spec, x.dtype, weight_dtype, m, x.shape[-1], device=x.device).backend  # type: ignore[arg-type]


def _reference_function(op: str, spec: NormSpec) -> Callable[..., Any]:
    """The op's arithmetic in plain PyTorch, with the op's checks and contiguous results."""

    def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            validate.check_rms_norm(x, weight, spec)
        return reference.rms_norm(x, weight, spec, _IMPLIED_EPS if eps is None else eps).contiguous()

    def fused_add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.compiler.is_compiling():
            validate.check_fused_add(x, residual, weight, spec)
        normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, _IMPLIED_EPS if eps is None else eps)
        return normed.contiguous(), total.contiguous()

    def fused_add_rms_norm_(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float | None
    ) -> None:
        validate.check_in_place(x, residual, weight, spec)
        normed, total = reference.fused_add_rms_norm(x, residual, weight, spec, _IMPLIED_EPS if eps is None else eps)
        residual.copy_(total)
        x.copy_(normed)

    functions: dict[str, Callable[..., Any]] = {
        "rms_norm": rms_norm,
        "fused_add_rms_norm": fused_add_rms_norm,
        "fused_add_rms_norm_": fused_add_rms_norm_,
    }
    return functions[op]


_IMPLIED_EPS = NormSpec(eps=None).resolve_eps(torch.float32)


@cache
def _bound_of(
    op: str,
    has_weight: bool,
    round_before_weight: str,
    weight_offset: str,
    output: str,
    sum: str,
    width: int | None,
    group: int | None,
    backend: str,
    enable_pdl: bool,
) -> Bound:
    spec = NormSpec(0.0, round_before_weight, weight_offset, has_weight, output, sum, width, group)  # type: ignore[arg-type]
    return _bind(op, spec, backend, enable_pdl)


_DEFAULTS = ("input", "none", "promote", "rounded", None, None, "auto", True)


def _bound_for(op: str, weight: torch.Tensor | None, spec: tuple[Any, ...]) -> Bound:
    return _bound_of(op, weight is not None, *spec, *_DEFAULTS[len(spec) :])


def _rms_norm(x, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    return _bound_for("rms_norm", weight, _positional(spec, named))(x, weight, eps)


def _fused_add_rms_norm(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    return _bound_for("fused_add_rms_norm", weight, _positional(spec, named))(x, residual, weight, eps)


def _fused_add_rms_norm_(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    _bound_for("fused_add_rms_norm_", weight, _positional(spec, named))(x, residual, weight, eps)


_NAMES = ("round_before_weight", "weight_offset", "output", "sum", "width", "group", "backend", "enable_pdl")


def _positional(spec: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    if not named:
        return spec
    return spec + tuple(
        named.get(name, default) for name, default in zip(_NAMES[len(spec) :], _DEFAULTS[len(spec) :], strict=True)
    )


def _fake_rms_norm(x, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    bound = _bound_for("rms_norm", weight, _positional(spec, named))
    validate.check_rms_norm(x, weight, bound.spec)
    return x.new_empty(x.shape, dtype=bound.spec.output_dtype(x.dtype, None if weight is None else weight.dtype))


def _fake_fused_add_rms_norm(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    bound = _bound_for("fused_add_rms_norm", weight, _positional(spec, named))
    validate.check_fused_add(x, residual, weight, bound.spec)
    out = bound.spec.output_dtype(x.dtype, None if weight is None else weight.dtype)
    return x.new_empty(x.shape, dtype=out), x.new_empty(x.shape)


def _fake_fused_add_rms_norm_(x, residual, weight, eps, *spec, **named):  # type: ignore[no-untyped-def]
    bound = _bound_for("fused_add_rms_norm_", weight, _positional(spec, named))
    validate.check_in_place(x, residual, weight, bound.spec)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The functional ops as reference arithmetic: a table for `make_fx`, `run_decompositions` and AOTAutograd."""

    def decompose(op: str) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            tensors = 2 if op == "rms_norm" else 3
            bound = _bound_for(op, args[tensors - 1], _positional(args[tensors + 1 :], named))
            return bound._reference(*args[: tensors + 1])

        return run

    return {getattr(torch.ops.rmsnorm_patch, op).default: decompose(op) for op in ("rms_norm", "fused_add_rms_norm")}


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "rms_norm": (_rms_norm, _fake_rms_norm),
        "fused_add_rms_norm": (_fused_add_rms_norm, _fake_fused_add_rms_norm),
        "fused_add_rms_norm_": (_fused_add_rms_norm_, _fake_fused_add_rms_norm_),
    }
    for name, (run, fake) in implementations.items():
        library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            library.impl(name, run, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


_LIBRARY = _register()
"""Kept for the life of the process: a Library takes its ops with it."""
