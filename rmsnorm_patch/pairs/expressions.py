"""Which expressions of a forward only move and shape tensors, or run nothing at all."""

from __future__ import annotations

import ast

from .dataflow import self_attribute

_SHAPING = frozenset(
    [
        "contiguous",
        "expand",
        "flatten",
        "float",
        "movedim",
        "permute",
        "reshape",
        "squeeze",
        "swapaxes",
        "to",
        "transpose",
        "type",
        "type_as",
        "unflatten",
        "unsqueeze",
        "view",
    ]
)
"""Methods of a tensor that compute or move nothing but the tensor itself, and write nothing."""
_PLAIN = (ast.Constant, ast.Name, ast.expr_context, ast.operator, ast.unaryop)
_NESTED = (ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Starred, ast.UnaryOp, ast.BinOp)


def only_shapes(statement: ast.stmt, norm: ast.Call | None) -> bool:
    """Whether `statement` binds one name to the result of `norm`, or to a value known before (None), in another shape
    or dtype or scaled."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target, value = statement.target, statement.value
    else:
        return False
    return isinstance(target, ast.Name) and _shapes(value, norm)


def moves_nothing(statement: ast.stmt, self_name: str) -> bool:
    """Whether `statement` binds one name to what children of the module and shapes make of names."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    return isinstance(statement.targets[0], ast.Name) and is_projection(statement.value, self_name)


def _shapes(value: ast.expr, core: ast.Call | None) -> bool:
    if value is core or (core is None and is_plain(value)):
        return True
    if isinstance(value, ast.BinOp):
        sides = (value.left, value.right)
        return any(_shapes(one, core) and is_plain(other) for one, other in (sides, sides[::-1]))
    return _is_shaping(value) and _shapes(value.func.value, core)  # type: ignore[attr-defined]


def _is_shaping(value: ast.expr) -> bool:
    """`x.method(...)`, a method of `_SHAPING` with arguments that run nothing."""
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr in _SHAPING
        and all(is_plain(argument) for argument in (*value.args, *(keyword.value for keyword in value.keywords)))
    )


def is_plain(value: ast.AST) -> bool:
    """Whether the expression calls nothing: names, their attributes, constants and arithmetic of these."""
    if isinstance(value, _PLAIN):
        return True
    return isinstance(value, _NESTED) and all(is_plain(child) for child in ast.iter_child_nodes(value))


def is_projection(value: ast.expr, self_name: str) -> bool:
    """Whether nothing runs for `value` but children of the module and methods that shape their results."""
    if is_plain(value):
        return True
    if not isinstance(value, ast.Call):
        return False
    arguments = (*value.args, *(keyword.value for keyword in value.keywords))
    if self_attribute(value.func, self_name) is not None:
        return all(is_projection(argument, self_name) for argument in arguments)
    return _is_shaping(value) and is_projection(value.func.value, self_name)  # type: ignore[attr-defined]


def reads_attributes(test: ast.expr, self_name: str) -> bool:
    """Whether a condition asks for attributes of the module and constants alone: `self.a is None or not self.b`."""
    if self_attribute(test, self_name) is not None or isinstance(test, ast.Constant):
        return True
    if not isinstance(test, (ast.BoolOp, ast.UnaryOp, ast.Compare)):
        return False
    return all(reads_attributes(each, self_name) for each in ast.iter_child_nodes(test) if isinstance(each, ast.expr))
