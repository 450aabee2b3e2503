"""The table of plain ops: what each row says, and that what is made from it elsewhere has every row and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rmsnorm_patch import ops
from rmsnorm_patch.backends.cuda import registry
from rmsnorm_patch.errors import UnsupportedInput
from rmsnorm_patch.fused.norm_add import kernel as norm_add_kernel
from rmsnorm_patch.fused.query_key_norm import kernel as query_key_norm_kernel
from rmsnorm_patch.fused.query_key_norm import rotated as rotated_kernel
from rmsnorm_patch.numerics.contract import FUNCTIONAL, PLAIN_OPS, PlainOp
from rmsnorm_patch.numerics.spec import LLAMA

ROWS = pytest.mark.parametrize("row", PLAIN_OPS.values(), ids=PLAIN_OPS)


def operands(row: PlainOp) -> tuple[Any, ...]:
    """The operands and the weight of a call."""
    return (*(torch.randn(3, 64) for _ in range(row.operands)), torch.randn(64))


def test_launcher_c_numbers_the_ops_as_the_table_does(repository: Path) -> None:
    source = (repository / "rmsnorm_patch/backends/cuda/launcher/launcher.c").read_text()
    found = re.search(r"enum \{ (RMS_NORM\b[^}]*) \};", source)
    assert found is not None
    spelled = {
        "fused_add_rms_norm": "FUSED_ADD",
        "fused_add_rms_norm_": "FUSED_ADD_IN_PLACE",
        "rms_norm_add": "NORM_ADD",
        "rms_norm_add_rms_norm": "NORM_ADD_NORM",
    }
    codes = {**{name: row.code for name, row in PLAIN_OPS.items()}, **norm_add_kernel.CODES}
    codes["two_norms"] = query_key_norm_kernel.TWO_NORMS
    codes["rotated"] = rotated_kernel.ROTATED
    assert found[1].split(", ") == [spelled.get(name, name.upper()) for name in codes]  # numbered from 0 on
    assert list(codes.values()) == list(range(len(codes)))


def test_every_row_is_an_op_of_torch_and_has_kernels() -> None:
    namespace = "rmsnorm_patch::"
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(namespace)}
    folders = (
        "linear_fused_add_rms_norm_",
        "joinable_rms_norm",
        "rms_norm_quantised",
        "fused_add_rms_norm_quantised_",
        "rms_norm_gated",
        "rms_norm_add",
        "rms_norm_add_rms_norm",
        "silu_and_mul_quantised",
        "block_product",  # the plugin's
    )
    others = {namespace + name for name in folders}  # in folders of their own, registered where these are imported
    assert registered - others == {namespace + name for name in PLAIN_OPS}
    assert set(PLAIN_OPS) < set(registry.OPS)
    assert {target.name().removeprefix(namespace) for target in ops.decompositions()} == set(FUNCTIONAL)


@ROWS
def test_columns_agree_with_the_schema(row: PlainOp) -> None:
    schema = getattr(torch.ops.rmsnorm_patch, row.name).default._schema
    names = [argument.name for argument in schema.arguments]
    assert names.index("weight") == row.operands
    assert ("residual" in names) == row.fused_add
    assert schema.is_mutable == row.in_place == (row.name not in FUNCTIONAL)
    assert len(schema.returns) == (0 if row.in_place else row.operands)


@ROWS
def test_bound_op_and_reference_are_one(row: PlainOp) -> None:
    given = operands(row)
    results = []
    for call in (
        lambda *tensors: row.reference(*tensors, LLAMA, 1e-6),
        lambda *tensors: ops.bind(row.name, LLAMA)(*tensors, 1e-6),
        lambda *tensors: getattr(torch.ops.rmsnorm_patch, row.name)(*tensors, 1e-6),
    ):
        tensors = tuple(tensor.clone() for tensor in given)
        results.append(row.results(call(*tensors), tensors[:-1]))
        for before, after in zip(given[:-1], tensors[:-1], strict=True):
            assert torch.equal(before, after) != row.in_place
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert len(results[0]) == row.operands


@ROWS
def test_fake_has_the_shapes_and_dtypes_of_the_reference(row: PlainOp) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        given = [tensor.to(dtype) for tensor in operands(row)]
        fake, real = row.fake(*given, LLAMA), row.reference(*given, LLAMA, 1e-6)
        if row.in_place:
            assert fake is real is None
            continue
        for mine, other in zip(row.results(fake, ()), row.results(real, ()), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (other.shape, other.dtype, other.stride())


@ROWS
def test_check_names_the_op(row: PlainOp) -> None:
    *tensors, _ = operands(row)
    with pytest.raises(UnsupportedInput) as caught:
        row.check(*tensors, torch.randn(63), LLAMA, row.name)
    assert caught.value.site == row.name
