"""The callable of one op, numerics variant and backend, which eager code and patched modules hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch

from ..backends import launch_mode
from ..backends.bindings import forgotten_with
from ..backends.names import BACKENDS, Backend
from ..errors import KernelBuildError, UnsupportedInput
from ..numerics import operands
from ..numerics.contract import FUSED_ADD, FUSED_ADD_IN_PLACE, IMPLIED_EPS, PLAIN_OPS, RMS_NORM
from ..numerics.spec import NormSpec
from . import dispatch, listeners
from .tracing import is_traced

CompileForm = Literal["op", "decomposed"]
COMPILE_VARIABLE = "RMSNORM_PATCH_COMPILE"

_is_compiling = torch.compiler.is_compiling  # first: most calls need to ask no more
_DECLINED = KernelBuildError, UnsupportedInput
"""What the CUDA backend says to a call that it does not serve."""
_mixes_dtypes = operands.mixes_dtypes
_BOUND: dict[tuple[tuple[str, NormSpec, str, bool, str], bool], Bound] = {}
forgotten_with(_BOUND.clear)


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
    return bind(RMS_NORM.name, spec, backend, enable_pdl)


def bind_fused_add_rms_norm(spec: NormSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> Bound:
    """f(x, residual, weight, eps) -> (normed, sum). Errors as `bind_rms_norm`."""
    return bind(FUSED_ADD.name, spec, backend, enable_pdl)


def bind_fused_add_rms_norm_(spec: NormSpec, backend: Backend = "auto", enable_pdl: bool | None = None) -> Bound:
    """f(x, residual, weight, eps) -> None; residual <- sum, x <- normed. Errors as `bind_rms_norm`."""
    return bind(FUSED_ADD_IN_PLACE.name, spec, backend, enable_pdl)


def bind(op: str, spec: NormSpec, backend: str = "auto", enable_pdl: bool | None = None) -> Bound:
    """The callable of a plain op by its name (`numerics.contract`): one object for each variant, backend and mode, and
    for each value of RMSNORM_PATCH_BACKEND, which is read here."""
    if op not in PLAIN_OPS:
        raise ValueError(f"op: got {op!r}; allowed: {', '.join(map(repr, PLAIN_OPS))}")
    if not isinstance(spec, NormSpec):
        raise ValueError(f"spec: got {spec!r}; allowed: a NormSpec")
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}")
    which = (op, spec.variant, backend, launch_mode.dependent(enable_pdl), dispatch.variable_for(backend))
    key = which, bool(listeners.active)  # somebody may begin to listen while another thread binds
    bound = _BOUND.get(key)
    if bound is None:
        bound = _BOUND.setdefault(key, (TellingBound if key[1] else Bound)(*which))
    return bound


class Bound:
    """One op bound to a numerics variant and a backend; called as the op without the spec's arguments.

    An instance, not a function: held as a class attribute it does not turn into a method.
    """

    __slots__ = (
        "_adds",
        "_args",
        "_device_call",
        "_direct",
        "_in_place",
        "_reference",
        "_routes",
        "_variable",
        "backend",
        "dependent",
        "op",
        "spec",
        "table",
    )
    _tells = False

    def __init__(self, op: str, spec: NormSpec, backend: str, dependent: bool, variable: str = "") -> None:
        """variable: what RMSNORM_PATCH_BACKEND says for backend "auto"."""
        self.op = op
        self.spec = spec
        self.backend = backend
        self.dependent = dependent
        """Whether its kernels are launched dependently, on devices that know such launches."""
        self._args = spec_args(spec, backend, dependent)
        self._in_place = PLAIN_OPS[op].in_place
        self._adds = PLAIN_OPS[op].fused_add
        self._variable = variable
        self._reference = _reference_function(op, spec)
        self._routes: dict[tuple[Any, ...], tuple[str, Callable[..., Any]]] = {}
        self._device_call: Callable[..., Any] | None = None
        """The CUDA backend's own callable once a call has been routed there: it knows what it serves, and says
        KernelBuildError to the rest, so that the usual call pays for no look-up here."""
        self._direct: Callable[..., Any] | None = None
        """The same for `__call__`, which asks nothing of the operands, until others had to serve what it declined."""
        self.table: object | None = None
        """What `dispatch.bind_on` gives with it, from the same moment on."""

    def __call__(self, *args: Any) -> Any:
        if _is_compiling() and is_traced():
            return self._traced(*args)
        call = self._direct
        if call is None or not args[0].is_cuda:
            return self.run(*args)
        try:  # here, not in `run`: the time of one Python function shows in a decode step
            return call(*args)
        except _DECLINED:
            pass
        result = self.run(*args)  # raises again where no other backend serves the call
        self._direct = None
        return result

    def run(self, *args: Any) -> Any:
        """The call itself, which the op's kernel in the dispatcher runs: a tracer has seen the op there."""
        call = self._device_call
        x, residual = args[0], args[1] if self._adds else None
        if call is not None and x.is_cuda and (residual is None or not _mixes_dtypes(x, residual)):
            try:
                return call(*args)
            except KernelBuildError:
                name, other = self._route(x, args[-2], residual)
                if name == "cuda":
                    raise
                return other(*args)
        if self._takes_reference(x):
            return self._reference(*args)
        return self._route(x, args[-2], residual)[1](*args)

    def _traced(self, *args: Any) -> Any:
        x, weight, eps = args[0], args[-2], args[-1]
        if not self._in_place and (
            self.backend == "reference" or compile_form(x.device.type) == "decomposed" or _needs_grad(args)
        ):
            return self._reference(*args)
        if not self.spec.has_weight:
            weight = None
        return getattr(torch.ops.rmsnorm_patch, self.op).default(*args[:-2], weight, eps, *self._args)

    def backend_for(
        self, x: torch.Tensor, weight: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> str:
        """ "reference", "triton" or "cuda": what a call with `x` runs (in eager mode)."""
        if self._takes_reference(x):
            return "reference"
        return self._route(x, weight, residual)[0]

    def _takes_reference(self, x: torch.Tensor) -> bool:
        """Whether nothing is to choose: it was asked for, or `x` is on a device without kernels and none is forced."""
        if self.backend != "auto":
            return self.backend == "reference"
        return not (x.is_cuda or (self._variable and x.device.type == "cpu"))

    def _route(
        self, x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None = None
    ) -> tuple[str, Callable[..., Any]]:
        """Choose for these (dtypes, N, device), never by the number of rows: a row's result must not depend on its
        batch. residual: where it is given, it may have another dtype than x."""
        added = x.dtype if residual is None else residual.dtype
        key = (x.dtype, added, x.shape[-1:], None if weight is None else weight.dtype, x.device)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._new_route(x, weight, added)
        return route

    def _new_route(
        self, x: torch.Tensor, weight: torch.Tensor | None, added: torch.dtype
    ) -> tuple[str, Callable[..., Any]]:
        operands.check_rms_norm(x, weight, self.spec, self.op)
        name = self.backend if self.backend != "auto" else self._chosen(x, weight, added)
        if name == "reference":
            return name, self._reference
        if name == "cuda" and not x.is_cuda:
            raise UnsupportedInput(
                self.op, f"x on {x.device}", "CUDA tensors for backend='cuda'", "use backend='auto' or 'reference'"
            )
        call, table = dispatch.bind_on(name, self.op, self.spec, self.dependent)
        if name == "cuda":
            if self._device_call is None:
                self._device_call = call
                self._direct = None if self._tells else call
            self.table = table
            return name, self._device_call
        return name, call

    def _chosen(self, x: torch.Tensor, weight: torch.Tensor | None, added: torch.dtype) -> str:
        n, weight_dtype = x.shape[-1], None if weight is None else weight.dtype
        choice = dispatch.choose(
            self.op,
            self.spec,
            x.dtype,
            weight_dtype,
            x.numel() // n,
            n,
            residual_dtype=added,
            device=x.device,
            variable=self._variable,
        )
        return choice.backend

    def __repr__(self) -> str:
        plain = "" if self.dependent else ", enable_pdl=False"
        return f"Bound({self.op!r}, {self.spec!r}, backend={self.backend!r}{plain})"


class TellingBound(Bound):
    """A Bound that tells `listeners` of its calls. A class of its own: where nobody listens, a call does not ask."""

    __slots__ = ()
    _tells = True

    def run(self, *args: Any) -> Any:
        result = super().run(*args)
        x = args[0]
        if type(x) is torch.Tensor and not is_traced():
            normed = result[0] if isinstance(result, tuple) else result
            listeners.tell(listeners.Call(self.op, self.spec, self.dependent, x, args[-2], normed))
        return result


def _needs_grad(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def _reference_function(op: str, spec: NormSpec) -> Callable[..., Any]:
    """The op's arithmetic in plain PyTorch, with the op's checks and contiguous results."""
    check, arithmetic = PLAIN_OPS[op].check, PLAIN_OPS[op].reference

    def run(*args: Any) -> Any:
        *tensors, eps = args
        if not is_traced():
            check(*tensors, spec, op)
        return arithmetic(*tensors, spec, IMPLIED_EPS if eps is None else eps)

    return run
