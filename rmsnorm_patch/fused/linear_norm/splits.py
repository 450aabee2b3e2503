"""How a library splits the inner dimension of a product of few rows, and the product in such parts.

To fill the device a library cuts K of a product [M, K] x [N, K] into parts, each the work of tiles of its own, and adds
up their fp32 results in a kernel of its own. It does not say how. Splits are compared, once for each shape and on made
rows: the split whose parts add up to the bits of `torch.mm` is the library's.

Only a finder that may reorder gives more: a product whose split cannot be had, or that is not split, in
as many parts as fill the device. Its sums are then fp32 sums in another order: as exact, but not those bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from ... import ops
from ...errors import RMSNormPatchError, UnsupportedInput
from ...numerics.spec import NormSpec
from ...ops import dispatch

MEASURED = (90,)
"""Compute capabilities on which leaving the sum of a split product to the norm was measured to pay."""
SPLITS = (2, 3, 4, 5, 6, 7, 8)
TILE = 64
"""Libraries cut K into steps of this many columns or a multiple; parts of another length are no split of theirs."""
COMPARED = 1 << 18
"""Elements of a product that are compared: so many that dozens of another split's would differ."""
TALL = 2048
"""Rows of a product that is not split: its tiles fill the device without."""
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


@dataclass(frozen=True)
class Split:
    """How the norm gets a product. "parts": in `parts` parts, which it adds up. Else whole: "whole" is one that the
    library does not split, "hidden" one whose parts cannot be had, "unknown" one that was not looked at."""

    kind: Literal["parts", "whole", "hidden", "unknown"]
    parts: int = 1


WHOLE, HIDDEN, UNKNOWN = Split("whole"), Split("hidden"), Split("unknown")


def in_parts(parts: int) -> Split:
    return Split("parts", parts)


Key = tuple[Product, NormSpec, torch.dtype | None]
on_found: list[Callable[[Product, Split], None]] = []
"""Who is told of each product that was looked at, with what was found."""
_THREAD = threading.local()
"""Marked while it compares: other threads serve forwards meanwhile."""


def is_comparing() -> bool:
    """Whether this thread compares a product with its parts: its calls belong to no forward."""
    return getattr(_THREAD, "compares", False)


def product_in_parts(rows: torch.Tensor, matrix: torch.Tensor, parts: int) -> torch.Tensor:
    """fp32 [parts, M, N]: the product over each of `parts` equal pieces of K. rows and matrix are not copied."""
    (m, k), n = rows.shape, matrix.shape[0]
    pieces = rows.view(m, parts, k // parts).transpose(0, 1)
    return torch.bmm(pieces, matrix.view(n, parts, k // parts).permute(1, 2, 0), out_dtype=torch.float32)


class SplitFinder:
    """Looks at products under one pair of settings, and remembers what it found.

    ahead: when a matrix is first seen, compare its products of each of these numbers of rows, and of no others after
    that; with None, each product when it is first seen. reordering: whether products may come in parts that do not add
    up to the bits of `torch.mm`, where that is faster.
    """

    def __init__(self, ahead: Iterable[int] | None = None, reordering: bool = False) -> None:
        self.ahead = None if ahead is None else tuple(sorted({m for m in ahead if _is_few(m)}))
        self.reordering = reordering
        self.known: dict[Key, Split] = {}
        self._seen: set[tuple[Any, ...]] = set()

    def __repr__(self) -> str:
        return f"SplitFinder(ahead={self.ahead}, reordering={self.reordering})"

    def forget(self) -> None:
        """Look at every product anew."""
        self.known.clear()
        self._seen.clear()

    def split_of(
        self,
        rows: torch.Tensor,
        matrix: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        spec: NormSpec,
    ) -> Split:
        """How the norm gets this product. UNKNOWN where nothing is asked: too many rows, rows apart or at odd
        addresses, another GPU than those measured, or a stream capture, in which nothing can be compared."""
        if self.ahead is None and not _is_few(rows.shape[0]):
            return UNKNOWN
        if not all(tensor.is_contiguous() for tensor in (rows, matrix, residual)):
            return UNKNOWN
        if (rows.data_ptr() | matrix.data_ptr()) % ALIGNMENT:
            return UNKNOWN
        key = _key(rows, matrix, weight, spec)
        split = self.known.get(key)
        sight = matrix.shape, rows.dtype, rows.get_device(), *key[1:]
        if split is not None or sight in self._seen:
            return split or UNKNOWN
        if not _may_split(rows, matrix, spec) or torch.cuda.is_current_stream_capturing():
            return UNKNOWN
        if self.ahead is not None:
            self._seen.add(sight)
        for m in (rows.shape[0],) if self.ahead is None else self.ahead:
            made = rows.new_empty(m, rows.shape[1])
            if (of_made := _key(made, matrix, weight, spec)) not in self.known:
                self.known[of_made] = self._compare(made, matrix, weight, spec)
        return self.known.get(key, UNKNOWN)

    def _compare(self, rows: torch.Tensor, matrix: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec) -> Split:
        product, *_ = _key(rows, matrix, weight, spec)
        _THREAD.compares = True
        try:
            split = _find_split(rows, matrix, weight, spec, self.reordering)
        finally:
            _THREAD.compares = False
        for tell in tuple(on_found):  # one of them may leave, or bring another
            tell(product, split)
        return split


_FINDERS: dict[str, SplitFinder] = {}


def settings_of(ahead: Iterable[int] | None = None, reordering: bool = False) -> str:
    """The settings of a finder as the op's argument `splits` holds them; "" for those that a finder has by itself.

    They travel with the graph, which may be compiled in one process and run in another, and beside other engines.
    """
    words = [] if ahead is None else ["ahead", *(str(m) for m in sorted({m for m in ahead if _is_few(m)}))]
    return " ".join([*words, "reorder"] if reordering else words)


def finder_of(settings: str) -> SplitFinder:
    """The one finder of this process with these settings. UnsupportedInput for what `settings_of` does not write."""
    finder = _FINDERS.get(settings)
    if finder is None:
        finder = _FINDERS.setdefault(settings, _new_finder(settings))
    return finder


def _new_finder(settings: str) -> SplitFinder:
    words = settings.split()
    reordering = words[-1:] == ["reorder"]
    numbers = words[: len(words) - reordering]
    try:
        ahead = [int(word) for word in numbers[1:]] if numbers else None
        valid = settings_of(ahead, reordering) == settings
    except ValueError:
        valid = False
    if not valid:
        supported = "'', or what splits.settings_of gives: 'ahead 1 2 4 reorder'"
        raise UnsupportedInput("splits", repr(settings), supported, "make it with settings_of")
    return SplitFinder(ahead, reordering)


def finders() -> tuple[SplitFinder, ...]:
    """Those that this process has."""
    return tuple(_FINDERS.values())


def _key(rows: torch.Tensor, matrix: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec) -> Key:
    (m, k), n = rows.shape, matrix.shape[0]
    return Product(m, n, k, rows.dtype, rows.get_device()), spec, None if weight is None else weight.dtype


def _is_few(m: int) -> bool:
    from . import kernel

    return 0 < m <= kernel.MOST_ROWS


def measured(device: torch.device) -> bool:
    """Whether leaving the sum of split products to the norm was measured to pay on this GPU."""
    return _measured(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _measured(device: int) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    return torch.version.hip is None and 10 * major + minor in MEASURED


def _may_split(rows: torch.Tensor, matrix: torch.Tensor, spec: NormSpec) -> bool:
    from . import kernel

    device = rows.get_device()
    return (
        _measured(device)
        and dispatch.available("cuda", rows.device)[0]
        and kernel.serves(spec, rows.dtype, matrix.shape[0], device)
    )


def _find_split(
    rows: torch.Tensor, matrix: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, reordering: bool
) -> Split:
    """The one split of K with which the parts add up to the bits of `torch.mm`, and the norm to those of the fused op.
    Where several do, the matrix is one that tells nothing of others of its shape."""
    k = rows.shape[1]
    try:
        products = [(made, torch.mm(made, matrix.t())) for made in _draws(rows, matrix.shape[0])]
        whole = _is_whole(products, matrix)
        if not whole:
            allowed = [parts for parts in SPLITS if k % (parts * TILE) == 0]
            equal = [parts for parts in allowed if _same_products(products, matrix, parts)]
            if len(equal) == 1 and _same_norms(products[:2], matrix, weight, spec, equal[0]):
                return in_parts(equal[0])
        if reordering and (parts := filling(rows, matrix)) > 1:
            reordered = [(made, _sum_of_parts(made, matrix, parts)) for made, _ in products[:2]]
            close = all(_is_close(ours[1], theirs[1]) for ours, theirs in zip(reordered, products, strict=False))
            if close and _same_norms(reordered, matrix, weight, spec, parts):
                return in_parts(parts)
        return WHOLE if whole else HIDDEN
    except (RMSNormPatchError, RuntimeError):  # out of memory among them: the product is served whole
        return HIDDEN


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


def _is_whole(products: list[Made], matrix: torch.Tensor) -> bool:
    """Whether these products are not split: then their bits are those of a product of so many rows that none is, in
    which K is run through in the same steps, whatever the tiles."""
    made, product = (torch.cat(tensors) for tensors in zip(*products, strict=True))
    tall = made.new_zeros(max(TALL, len(made)), made.shape[1])
    tall[: len(made)] = made
    return torch.equal(torch.mm(tall, matrix.t())[: len(made)], product)


def _sum_of_parts(rows: torch.Tensor, matrix: torch.Tensor, parts: int) -> torch.Tensor:
    total, *pieces = product_in_parts(rows, matrix, parts)
    for piece in pieces:
        total = total + piece
    return total.to(rows.dtype)


def _same_products(products: list[Made], matrix: torch.Tensor, parts: int) -> bool:
    different = torch.zeros((), dtype=torch.int64, device=matrix.device)
    for made, product in products:
        different += (_sum_of_parts(made, matrix, parts) != product).sum()
    return int(different) == 0


def filling(rows: torch.Tensor, matrix: torch.Tensor) -> int:
    """The parts of a product of up to 32 rows with which tiles of 64 columns fill the device; 1 where K is too short,
    and where two parts would do: there the library splits by itself where it pays."""
    (m, k), n = rows.shape, matrix.shape[0]
    processors = torch.cuda.get_device_properties(matrix.device).multi_processor_count
    fitting = (parts for parts in (8, 4) if parts * -(-n // TILE) <= processors and k % (parts * TILE) == 0)
    return next(fitting, 1) if m <= 32 else 1


def _is_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two roundings of one fp32 sum, in other orders, lie as near each other as they must."""
    step = torch.finfo(theirs.dtype).eps
    near = step * theirs.float().abs() + step / 16 * theirs.float().square().mean().sqrt()
    return bool(((ours.float() - theirs.float()).abs() <= near).all())


def _same_norms(
    products: list[Made], matrix: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, parts: int
) -> bool:
    from . import kernel

    for made, product in products:
        x, residual, eps = product.clone(), product.flip(0), 1e-6
        total, normed = residual.clone(), torch.empty_like(product)
        ops.bind_fused_add_rms_norm_(spec, "cuda")(x, total, weight, eps)
        pieces = product_in_parts(made, matrix, parts)
        kernel.bound(spec, parts)(pieces, residual, weight, eps, normed)
        if not (torch.equal(normed, x) and torch.equal(residual, total)):
            return False
    return True
