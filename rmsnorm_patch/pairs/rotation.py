"""The rotation behind the norms of a query and its key, and whether it is the one that a kernel computes.

    q, k = apply_rotary_pos_emb(q, k, cos, sin)

The attention's source must show that the statement reads what the two norms gave, transposed at most. It may end a
branch that attributes of the layer choose: some layers do not rotate. What the function computes is judged by two
witnesses: its own source, straight-line statements that are run on symbols, and its results
on probes, bit for bit. A function of another module is another one: nothing is decided by its name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.fx

from ..numerics import rotation
from ..scan.probe import same_bits
from .dataflow import NormCall, assigned_names, is_passive
from .expressions import moves_nothing, reads_attributes
from .source import ForwardSource, parse
from .sums import written_by
from .trace import holds

_PROBE = (2, 3, 16)
"""Batch, length and N of the probes; the symbols have this N too."""
_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)
_EXPRESSIONS = (
    *(ast.Name, ast.Constant, ast.Tuple, ast.Slice, ast.Subscript, ast.Attribute, ast.Call, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context),
)


@dataclass(eq=False)
class Rotation:
    """The statement that rotates what two norms gave. name: of its function. transposed: whether both results are
    transposed (1, 2) in front of it. between: what else stands behind the first norm and before it, or before `branch`:
    the condition that it depends on, which it ends."""

    statement: ast.Assign
    call: ast.Call
    name: str
    transposed: bool
    between: list[ast.stmt]
    branch: ast.If | None = None

    @property
    def last(self) -> ast.stmt:
        """The statement of the norms' own block that it is, or stands in."""
        return self.statement if self.branch is None else self.branch


# what the attention's source shows


def rotation_behind(tree: ast.FunctionDef, query: NormCall, key: NormCall, self_name: str) -> Rotation | str:
    """The rotation of what the two norms give; else why it cannot be part of their launch, "" where there is none.

    tree: of the whole forward. What computes by children of the module and shapes alone may run ahead of the norms."""
    block, behind = key.block, key.statement.end_lineno or 0
    if not any(isinstance(node, ast.Call) and _rotates(node) and node.lineno > behind for node in ast.walk(tree)):
        return ""
    shapes = [_bound_name(call) for call in (query, key)]
    names = [name for name, _ in filter(None, shapes)]
    begin, end = block.index(query.statement), block.index(key.statement)
    for position in range(end + 1, len(block)):
        statement = block[position]
        between = [*block[begin + 1 : end], *block[end + 1 : position]]
        branch = statement if isinstance(statement, ast.If) and not statement.orelse else None
        last = statement if branch is None else branch.body[-1]
        call = last.value if isinstance(last, ast.Assign) else None
        if isinstance(last, ast.Assign) and isinstance(call, ast.Call) and _rotates(call):
            return _why_branch(branch, self_name) or _read(last, call, shapes, between, branch)
        if _mentions(statement, names):
            rotated = any(isinstance(node, ast.Call) and _rotates(node) for node in ast.walk(statement))
            return "it stands in another block" if rotated else "the norms' results are read before it"
        if not (is_passive(statement) or _unpacks(statement) or moves_nothing(statement, self_name)):
            return "code runs between the norms and it"
    return "it stands in another block"


def _rotates(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and "rotary" in call.func.id


def _why_branch(branch: ast.If | None, self_name: str) -> str:
    """Why a rotation that ends `branch` cannot be part of a launch, or ""."""
    if branch is None:
        return ""
    if not all(is_passive(statement) or _unpacks(statement) for statement in branch.body[:-1]):
        return "code runs between the norms and it"
    return "" if reads_attributes(branch.test, self_name) else "whether it runs shows in the call alone"


def _read(
    statement: ast.Assign,
    call: ast.Call,
    shapes: list[tuple[str, bool] | None],
    between: list[ast.stmt],
    branch: ast.If | None,
) -> Rotation | str:
    if None in shapes:
        return "a norm's result is more than transposed in front of it"
    (first, transposed), (second, also) = shapes  # type: ignore[misc]
    targets = statement.targets[0] if len(statement.targets) == 1 else None
    named = isinstance(targets, ast.Tuple) and all(isinstance(each, ast.Name) for each in targets.elts)
    given = [each.id for each in call.args if isinstance(each, ast.Name)]
    if not named or len(targets.elts) != 2 or call.keywords or len(given) != len(call.args) or len(given) != 4:  # type: ignore[union-attr]
        return "its statement is not `q, k = rotate(q, k, cos, sin)`"
    bound = [each.id for each in targets.elts]  # type: ignore[union-attr]
    if given[:2] != [first, second] or bound != given[:2] or transposed is not also or first == second:
        return "it rotates something else than the norms' results, each of one form"
    ahead = between if branch is None else [*between, *branch.body[:-1]]
    if _mentions_any(ahead, {first, second}) or {first, second} & set(given[2:]):
        return "the norms' results are read or bound anew before it"
    return Rotation(statement, call, call.func.id, transposed, between, branch)  # type: ignore[attr-defined]


def _bound_name(call: NormCall) -> tuple[str, bool] | None:
    """(the name that the norm's statement binds, whether to the result transposed (1, 2)); None for other values."""
    statement = call.statement
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
        return None
    name, value = statement.targets[0].id, statement.value
    if value is call.node:
        return name, False
    plain = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.value is call.node
    if plain and ast.unparse(value).endswith(".transpose(1, 2)"):
        return name, True
    return None


def _unpacks(statement: ast.stmt) -> bool:
    """`cos, sin = position_embeddings`"""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
        return False
    targets = statement.targets[0]
    return (
        len(statement.targets) == 1
        and isinstance(targets, ast.Tuple)
        and all(isinstance(each, ast.Name) for each in targets.elts)
    )


def _mentions(statement: ast.stmt, names: list[str]) -> bool:
    return any(isinstance(node, ast.Name) and node.id in names for node in ast.walk(statement))


def _mentions_any(statements: list[ast.stmt], names: set[str]) -> bool:
    return any(_mentions(each, list(names)) for each in statements) or bool(assigned_names(statements) & names)


def confirm(
    rotation: Rotation, at: list[int | None], nodes: list[torch.fx.Node], ended: str, source: ForwardSource
) -> str | None:
    """ "" where a trace shows that the rotation alone reads the norms' results, and its function is the one that a
    kernel computes; None where this instance does not rotate; else why not. at: the norms' places among the nodes."""
    name, code = rotation.name, source.function.__code__
    why = why_other(source.function.__globals__.get(name))
    if why or name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
        return f"{name}: {why or 'a local name'}"
    called = [node for node in nodes if node.op == "call_method" and node.target == name]
    called = [node for node in called if holds(rotation.call, node.meta["line"])]
    behind = rotation.last.end_lineno or 0
    if rotation.branch is not None and not called and any(node.meta["line"] > behind for node in nodes):
        return None
    places = [place for place in at if place is not None]
    if len(called) != 1 or len(places) != 2:
        return ended or "a trace of its forward does not show it"
    given = [_transposed(nodes[place]) if rotation.transposed else nodes[place] for place in places]
    alone = all(each is not None and set(each.users) == {called[0]} for each in given)
    if not alone or list(called[0].args[:2]) != given:
        return "a trace of its forward shows that it reads something else than the norms' results"
    if any(written_by(node) is not None for node in nodes[max(places) : nodes.index(called[0])]):
        return "a trace of its forward shows that code runs between the norms and it"
    return ""


def _transposed(norm: torch.fx.Node) -> torch.fx.Node | None:
    """What reads a norm's result, where that is `transpose(1, 2)` alone."""
    (only,) = norm.users if len(norm.users) == 1 else (None,)
    fits = only is not None and only.op == "call_method" and only.target == "transpose"
    return only if fits and only is not None and only.args[1:] == (1, 2) else None


# what its function computes


class Known:
    """A function that rotates as `rotation.rotate` does, with the helpers that it calls, as they were judged."""

    __slots__ = ("function", "parts")

    def __init__(self, function: FunctionType, parts: tuple[tuple[FunctionType, str, FunctionType], ...]) -> None:
        """parts: (a function, the name by which it finds a helper, that helper), at any depth."""
        self.function = function
        functions = [function, *(helper for _, _, helper in parts)]
        self.parts = (
            tuple((each, each.__code__, each.__defaults__) for each in functions),
            tuple((user.__globals__, name, helper) for user, name, helper in parts),
        )

    def intact(self) -> bool:
        """Whether it still runs what was judged: no code, default or helper was replaced."""
        for function, code, defaults in self.parts[0]:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
        return all(names.get(name) is helper for names, name, helper in self.parts[1])


_KNOWN: dict[Any, Known] = {}


def known(function: Any) -> Known | None:
    """What was judged of `function` by `why_other`, while it is intact."""
    found = _KNOWN.get(function) if isinstance(function, FunctionType) else None
    return found if found is not None and found.intact() else None


def why_other(function: Any) -> str:
    """Why `function` is not the rotation that a kernel computes; "" where it is, and `known` from then on."""
    if known(function) is not None:
        return ""
    if not isinstance(function, FunctionType):
        return f"it is a {type(function).__name__}, not a plain function"
    try:
        made = Known(function, tuple(_helpers(function)))
        symbols = tuple(_Term((name,)) for name in ("q", "k", "cos", "sin"))
        given = function(*symbols)
        wanted = tuple(_expected(name) for name in ("q", "k"))
    except Exception as error:  # the model's own code on symbols: anything can happen
        return f"its source is of another rotation ({str(error)[:80] or type(error).__name__})"
    if not isinstance(given, tuple) or tuple(getattr(each, "of", None) for each in given) != wanted:
        return "its source is of another rotation"
    with torch.no_grad(), torch.device("cpu"):  # a program may have set another default
        why = _why_other_bits(function)
    if why:
        return why
    _KNOWN[function] = made
    return ""


def _helpers(function: FunctionType, depth: int = 0) -> Iterator[tuple[FunctionType, str, FunctionType]]:
    """The global functions that straight-line code calls. Raises ValueError for code of any other form."""
    if function.__closure__ or depth > 2:
        raise ValueError("a closure or a deep chain of calls")
    for statement in parse(function).body:
        if not isinstance(statement, _STATEMENTS) or (
            isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
        ):
            raise ValueError(f"a statement `{type(statement).__name__.lower()}`")
        values = [statement.value, *getattr(statement, "targets", ())]
        for node in (node for value in filter(None, values) for node in ast.walk(value)):
            if not isinstance(node, _EXPRESSIONS):
                raise ValueError(f"an expression of kind {type(node).__name__}")
    for name in function.__code__.co_names:
        helper = function.__globals__.get(name)
        if isinstance(helper, FunctionType):
            yield function, name, helper
            yield from _helpers(helper, depth + 1)
        elif helper is not None and helper is not torch:
            raise ValueError(f"the global {name}")


class _Term:
    """A tensor by what computed it: `of` is a nested tuple. Whatever is asked of it beyond a rotation raises."""

    def __init__(self, of: tuple[Any, ...]) -> None:
        self.of = of

    @property
    def shape(self) -> tuple[int, ...]:
        return (*_PROBE[:1], 1, *_PROBE[1:])

    def unsqueeze(self, dim: int) -> _Term:
        return _Term(("unsqueeze", self.of, dim))

    def __neg__(self) -> _Term:
        return _Term(("neg", self.of))

    def __add__(self, other: _Term) -> _Term:
        return _Term(("add", self.of, other.of))

    def __mul__(self, other: _Term) -> _Term:
        return _Term(("mul", self.of, other.of))

    def __getitem__(self, at: tuple[Any, slice]) -> _Term:
        dots, part = at
        if dots is not Ellipsis or not isinstance(part, slice):
            raise ValueError("an index that is no slice of rows")
        return _Term(("slice", self.of, *part.indices(_PROBE[2])))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Term:
        if function is not torch.cat or len(args) != 1:
            raise ValueError(f"a call of {getattr(function, '__name__', function)}")
        return cls(("cat", *(each.of for each in args[0]), tuple((kwargs or {}).items())))


def _expected(name: str) -> tuple[Any, ...]:
    x, cos, sin = (_Term((each,)) for each in (name, "cos", "sin"))
    return rotation.rotate(x, cos, sin).of  # type: ignore[arg-type, attr-defined, no-any-return]


def _why_other_bits(function: FunctionType) -> str:
    batch, length, n = _PROBE
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30, torch.inf, -torch.inf, torch.nan, 6e4, -6e4, 1e-7])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = [
            torch.randn(shape, generator=generator) * 3
            for shape in ((batch, length, 4, n), (batch, length, 2, n), (batch, length, n), (1, length, n))
        ]
        made[0].view(-1)[: odd.numel()] = odd
        made[2].view(-1)[n : n + odd.numel()] = odd
        q, k, cos, sin = (each.to(dtype) for each in made)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        for got, x in zip(function(q, k, cos, sin), (q, k), strict=True):
            want = rotation.rotate(x, cos, sin)
            if got.stride() != want.stride() or not same_bits(got, want):
                return f"its bits are others in {str(dtype).removeprefix('torch.')}"
    return ""
