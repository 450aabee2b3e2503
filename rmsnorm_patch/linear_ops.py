"""A product and the fused norm that reads it, as one op: what of the product the norm's kernel can do is left to it.

    linear_fused_add_rms_norm_(rows, matrix, residual!, weight?, eps, ...) -> normed

x = rows @ matrix.T, rounded to rows' dtype; residual <- x + residual; the result is the norm of that sum. rows: [M, K],
matrix: [N, K], residual: [M, N], of one dtype; weight: [N] or None; the arguments after eps are `ops.spec_args`.

The bits are those of `torch.mm` and `fused_add_rms_norm_`. Where `torch.mm` splits K, adds the parts in a kernel of its
own and rounds, the op asks for the parts and leaves that to the norm (`cuda_partials`). How the library splits is found
out by comparing, once for each shape: a split is taken only if it gives the bits of `torch.mm`, and where none does, or
nothing can be compared, the norm gets the product. No result depends on what was chosen. A server compares what it
captures at the first sight of a matrix (`compare_ahead`), so that no request waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from . import ops, validate
from .errors import RMSNormPatchError, UnsupportedInput
from .plan import Backend
from .semantics import NormSpec

NAME = "linear_fused_add_rms_norm_"
_IN_PLACE = ops.SCHEMAS["fused_add_rms_norm_"]
SCHEMA = _IN_PLACE.replace("Tensor(a!) x", "Tensor rows, Tensor matrix").replace("-> ()", "-> Tensor")
MEASURED = (90,)
"""Compute capabilities on which leaving the sum of a split product to the norm was measured to pay."""
SPLITS = (2, 3, 4, 5, 6, 7, 8)
TILE = 64
"""Libraries cut K into steps of this many columns or a multiple; parts of another length are no split of theirs."""
COMPARED = 1 << 18
"""Elements of a product that are compared. Another split changed 2 to 9 in 10 000 of the sums with a residual (bf16,
K = 2048 to 14336, H100), so that 50 or more would differ."""
ALIGNMENT = 256
"""Bytes of which the addresses of rows and matrix are multiples, as an allocator gives them. The rows that are compared
lie so; for others a library may choose another kernel, and with it another split."""


@dataclass(frozen=True)
class Product:
    """A product [m, k] x [n, k] on one device, as the library that computes it sees it."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    device: int


Key = tuple[Product, NormSpec, torch.dtype | None]
_SPLITS: dict[Key, int] = {}
_SEEN: set[tuple[Any, ...]] = set()
_ahead: tuple[int, ...] | None = None
on_found: list[Callable[[Product, int], None]] = []
"""Who is told of each product that was looked at, and the parts in which the norm gets it: 1 for the whole."""
_comparing: list[Product] = []


def compare_ahead(rows: Iterable[int] | None) -> None:
    """When a matrix is first seen, compare its products of each of these numbers of rows, and of no others after that.
    With None, as it begins: each product when it is first seen."""
    global _ahead
    _ahead = None if rows is None else tuple(sorted(set(rows)))
    _SEEN.clear()


def is_comparing() -> bool:
    """Whether the calls made now compare a product with its parts: they belong to no forward."""
    return bool(_comparing)


def _linear_fused_add_rms_norm_(  # type: ignore[no-untyped-def]
    rows, matrix, residual, weight, eps, *spec
):
    variant, backend, fused = _bound(weight is not None, *spec)
    check(rows, matrix)
    parts = None
    if rows.is_cuda and backend in ("auto", "cuda"):
        parts = split_of(rows, matrix, residual, weight, variant)
    if parts is not None and weight is not None:
        # Only with a parameter is a norm launched dependently. Behind a product's own kernel that costs 0.1 to 0.2 us.
        weight = weight.detach()
    if parts is None or parts == 1:
        x = torch.mm(rows, matrix.t())
        fused(x, residual, weight, eps)
        return x
    from . import cuda_partials

    normed = _for_result(rows, matrix)
    validate.check_in_place(normed, residual, weight, variant, NAME)
    add_up, eps = cuda_partials.bound(variant, parts), _IMPLIED_EPS if eps is None else eps
    add_up(product_in_parts(rows, matrix, parts), residual, weight, eps, normed)
    if not residual.is_inference():  # autograd counts what an in-place op wrote
        torch.autograd.graph.increment_version(residual)
    return normed


_DEFAULTS = ops.spec_args(NormSpec())
_IMPLIED_EPS = NormSpec(eps=None).resolve_eps(torch.float32)


@cache
def _bound(has_weight: bool, *spec: object) -> tuple[NormSpec, Backend, ops.Bound]:
    """Of the arguments after eps, of which those at the end may be missing."""
    arguments: tuple[Any, ...] = (*spec, *_DEFAULTS[len(spec) :])
    before, offset, output, sum_of, width, group, backend = arguments
    variant = NormSpec(0.0, before, offset, has_weight, output, sum_of, width, group)
    return variant, backend, ops.bind_fused_add_rms_norm_(variant, backend)


def check(rows: torch.Tensor, matrix: torch.Tensor) -> None:
    """Raise UnsupportedInput for operands that make no product; the norm's own are checked where it is called."""
    if (
        rows.dim() != 2
        or matrix.dim() != 2
        or rows.shape[1] != matrix.shape[1]
        or rows.dtype != matrix.dtype
        or rows.device != matrix.device
    ):
        got = (f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in (rows, matrix))
        raise UnsupportedInput(
            NAME, " times ".join(got), "rows [M, K] and a matrix [N, K] of one dtype on one device", "correct the call"
        )


def _for_result(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """What takes the place of the product, which the norm reads and overwrites."""
    return rows.new_empty(rows.shape[0], matrix.shape[0])


def product_in_parts(rows: torch.Tensor, matrix: torch.Tensor, parts: int) -> torch.Tensor:
    """fp32 [parts, M, N]: the product over each of `parts` equal pieces of K. rows and matrix are not copied."""
    (m, k), n = rows.shape, matrix.shape[0]
    pieces = rows.view(m, parts, k // parts).transpose(0, 1)
    return torch.bmm(pieces, matrix.view(n, parts, k // parts).permute(1, 2, 0), out_dtype=torch.float32)


def split_of(
    rows: torch.Tensor, matrix: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec
) -> int | None:
    """The parts in which the norm gets this product, 1 for the whole; None where that is not known and not asked: too
    many rows, rows apart or at odd addresses, another GPU than those measured, or a stream capture, in which nothing
    can be compared."""
    if _ahead is None and not _is_few(rows.shape[0]):
        return None
    if not all(tensor.is_contiguous() for tensor in (rows, matrix, residual)):
        return None
    if (rows.data_ptr() | matrix.data_ptr()) % ALIGNMENT:
        return None
    key = _key(rows, matrix, weight, spec)
    parts = _SPLITS.get(key)
    sight = matrix.shape, rows.dtype, rows.get_device(), *key[1:]
    if parts is not None or sight in _SEEN:
        return parts
    if not _may_split(rows, matrix, spec) or torch.cuda.is_current_stream_capturing():
        return None
    if _ahead is not None:
        _SEEN.add(sight)
    for m in filter(_is_few, (rows.shape[0],) if _ahead is None else _ahead):
        made = rows.new_empty(m, rows.shape[1])
        if (of_made := _key(made, matrix, weight, spec)) not in _SPLITS:
            _SPLITS[of_made] = _compare(made, matrix, weight, spec)
    return _SPLITS.get(key)


def _key(rows: torch.Tensor, matrix: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec) -> Key:
    (m, k), n = rows.shape, matrix.shape[0]
    return Product(m, n, k, rows.dtype, rows.get_device()), spec, None if weight is None else weight.dtype


def _is_few(m: int) -> bool:
    from . import cuda_partials

    return 0 < m <= cuda_partials.MOST_ROWS


def _compare(rows: torch.Tensor, matrix: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec) -> int:
    product, *_ = _key(rows, matrix, weight, spec)
    _comparing.append(product)
    try:
        parts = _find_split(rows, matrix, weight, spec)
    finally:
        _comparing.pop()
    for tell in on_found:
        tell(product, parts)
    return parts


@cache
def _measured(device: int) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return torch.version.hip is None and 10 * major + minor in MEASURED


def _may_split(rows: torch.Tensor, matrix: torch.Tensor, spec: NormSpec) -> bool:
    from . import cuda_backend, cuda_partials

    device = rows.get_device()
    return (
        _measured(device)
        and cuda_backend.available(rows.device)[0]
        and cuda_partials.serves(spec, rows.dtype, matrix.shape[0], device)
    )


def _find_split(rows: torch.Tensor, matrix: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec) -> int:
    """The split of K with which the parts add up to the bits of `torch.mm` and the norm to the bits of the fused op."""
    k = rows.shape[1]
    allowed = [parts for parts in SPLITS if k % (parts * TILE) == 0]
    try:
        products = [(made, torch.mm(made, matrix.t())) for made in _draws(rows, matrix.shape[0])]
        equal = [parts for parts in allowed if _same_products(products, matrix, parts)]
        # Where every split gives the same bits (zeros, say), the comparison tells nothing.
        told = equal and len(equal) < len(allowed)
        return equal[0] if told and _same_norms(products[:2], matrix, weight, spec, equal[0]) else 1
    except (RMSNormPatchError, RuntimeError):  # out of memory among them: the product is served whole
        return 1


def _draws(rows: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Made rows like these, as many as give products of `COMPARED` elements."""
    generator = torch.Generator(rows.device).manual_seed(0)
    count = max(2, -(-COMPARED // (rows.shape[0] * n)))
    return [
        torch.randn(rows.shape, generator=generator, device=rows.device, dtype=torch.float32).to(rows.dtype)
        for _ in range(count)
    ]


Made = tuple[torch.Tensor, torch.Tensor]
"""Made rows and their product."""


def _same_products(products: list[Made], matrix: torch.Tensor, parts: int) -> bool:
    different = torch.zeros((), dtype=torch.int64, device=matrix.device)
    for made, product in products:
        total, *pieces = product_in_parts(made, matrix, parts)
        for piece in pieces:
            total = total + piece
        different += (total.to(product.dtype) != product).sum()
    return int(different) == 0


def _same_norms(
    products: list[Made], matrix: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, parts: int
) -> bool:
    from . import cuda_partials

    for made, product in products:
        x, residual, eps = product.clone(), product.flip(0), 1e-6
        total, normed = residual.clone(), torch.empty_like(product)
        ops.bind_fused_add_rms_norm_(spec, "cuda")(x, total, weight, eps)
        pieces = product_in_parts(made, matrix, parts)
        cuda_partials.bound(spec, parts)(pieces, residual, weight, eps, normed)
        if not (torch.equal(normed, x) and torch.equal(residual, total)):
            return False
    return True


def _fake(rows, matrix, residual, weight, eps, *spec):  # type: ignore[no-untyped-def]
    check(rows, matrix)
    normed = _for_result(rows, matrix)
    validate.check_in_place(normed, residual, weight, _bound(weight is not None, *spec)[0], NAME)
    return normed


def _register() -> torch.library.Library:
    library = torch.library.Library(ops.NAMESPACE, "FRAGMENT")
    library.define(NAME + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        library.impl(NAME, _linear_fused_add_rms_norm_, key)
    torch.library.register_fake(f"{ops.NAMESPACE}::{NAME}", _fake, lib=library)
    return library


_LIBRARY = _register()
"""Kept for the life of the process: a Library takes its ops with it."""
