"""Where the CUDA kernels are told that rows lie: what stands there are the rows."""

from __future__ import annotations

import itertools

import pytest
import torch

from rmsnorm_patch.backends.cuda.rows import Rows, in_step, one_level, power_of_two, rows_of

PLACES = {
    "contiguous": lambda: torch.randn(2, 2, 3, 8),
    "part of a wider tensor": lambda: torch.randn(2, 2, 3, 24)[..., 8:16],
    "every second row": lambda: torch.randn(2, 2, 6, 8)[..., ::2, :],
    "3 inner rows": lambda: torch.randn(2, 2, 5, 24)[..., 1:4, :8],
    "6 inner rows": lambda: torch.randn(2, 4, 3, 8)[:, 1:3],
    "three levels": lambda: torch.randn(2, 3, 5, 8)[:, :2, :3],
    "transposed rows": lambda: torch.randn(3, 2, 2, 8).permute(1, 2, 0, 3),
    "columns apart": lambda: torch.randn(2, 2, 8, 3).transpose(2, 3),
}


def read(rows: Rows, count: int, n: int, inner: int, outer: int) -> torch.Tensor:
    """The rows as a kernel addresses them; one level where `inner` is 0."""
    starts = [(r // inner) * outer + (r % inner) * rows.stride if inner else r * rows.stride for r in range(count)]
    first = rows.tensor.storage_offset()
    held = rows.tensor.untyped_storage()
    flat = torch.empty(0).set_(held, 0, (held.nbytes() // 4,), (1,))  # type: ignore[call-overload]
    return torch.stack([flat[first + start : first + start + n] for start in starts])


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize(("one", "two"), list(itertools.product(PLACES, [*PLACES, None])))
def test_rows_in_step_have_one_number_of_inner_rows(one, two, group):
    x, other, n = PLACES[one](), None if two is None else PLACES[two](), group or 8
    step = in_step(x, other, group)
    assert torch.equal(read(step.rows, 96 // n, n, step.inner_rows, step.outer_stride), x.reshape(-1, n))
    assert (step.other is None) == (other is None)
    if step.other is not None:
        assert torch.equal(read(step.other, 96 // n, n, step.inner_rows, step.other_outer_stride), other.reshape(-1, n))
    levels = [rows.two_level for rows in (step.rows, step.other) if rows is not None]
    assert step.two_level == any(levels) == (step.inner_rows > 0)


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_one_level_have_one_stride(place):
    x = PLACES[place]()
    rows = one_level(x)
    assert not rows.two_level
    assert torch.equal(read(rows, 12, 8, 0, 0), x.reshape(-1, 8))
    alone = rows_of(x)
    assert alone.two_level or rows.stride == alone.stride


def test_offsets_count_elements_of_the_size_that_is_asked_for():
    x = torch.zeros(65)[1:].view(2, 4, 8)[:, :3]  # 4 bytes behind an aligned address
    assert power_of_two(*rows_of(x).offsets(4)) == 4
    assert power_of_two(*rows_of(x).offsets(2)) == 2
