"""Which norms may read a sum, in any form and on any path: what the plan names where no trace of a forward can tell."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from .dataflow import assigned_names, own_name, self_attribute
from .sums import ADD_MORE, COPIES

_ADDING = ("add", "add_", "__add__", "__radd__", "__iadd__")
_TAKING = ("sub", "sub_", "subtract", "subtract_", "rsub", "__sub__", "__rsub__", "__isub__")
_WRITING = ("add_", "__iadd__", "sub_", "subtract_", "__isub__")


@functools.lru_cache(maxsize=256)
def possible_pairs(tree: ast.FunctionDef, norms: frozenset[str]) -> tuple[tuple[ast.AST, str], ...]:
    """(an add, the norm that may read it). norms: paths below the module."""
    return tuple(_Guesses(tree, norms).found())


@functools.lru_cache(maxsize=256)
def possible_entries(tree: ast.FunctionDef, norms: frozenset[str]) -> tuple[str, ...]:
    """The norms that may read the forward's first argument, in their order."""
    guesses = _Guesses(tree, norms)
    arguments = [*tree.args.posonlyargs, *tree.args.args][1:2]
    guesses.sums.update((argument.arg, argument) for argument in arguments)
    return tuple(norm for add, norm in guesses.found() if add in arguments)


@functools.lru_cache(maxsize=256)
def may_return_a_sum(tree: ast.FunctionDef) -> bool:
    """Whether the forward may return what it added last, or that in front of a tuple."""
    guesses = _Guesses(tree, frozenset())
    guesses.found()
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    firsts = [value.elts[0] if isinstance(value, ast.Tuple) and value.elts else value for value in returned]
    return any(value is not None and guesses.sum_in(value) is not None for value in firsts)


class _Guesses:
    def __init__(self, tree: ast.FunctionDef, norms: frozenset[str]) -> None:
        self.tree = tree
        self.norms = norms
        self.roots = {path.partition(".")[0] for path in norms}
        self.self_name = own_name(tree)
        self.sums: dict[str, ast.AST] = {}
        self.aliases: dict[str, frozenset[str]] = {}

    def found(self) -> list[tuple[ast.AST, str]]:
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, (ast.stmt, ast.expr))]
        nodes.sort(key=lambda n: (n.end_lineno, n.end_col_offset, -n.lineno, -n.col_offset))  # as they are finished
        turns = 2 if any(isinstance(node, (ast.For, ast.While)) for node in nodes) else 1
        found: dict[str, ast.AST] = {}
        for node in nodes * turns:
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = assigned_names([ast.Expr(target) for target in targets])
                add, named = self.sum_in(node.value), self._norms_of(node.value)
                if node in self.tree.body:  # on every path
                    for name in names:
                        self.sums.pop(name, None)
                self.sums.update({} if add is None else dict.fromkeys(names, add))
                self.aliases.update(dict.fromkeys(names, named) if named else {})
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                if isinstance(node.op, ast.Add) or (isinstance(node.op, ast.Sub) and _is_negative(node.value)):
                    self.sums[node.target.id] = node
            elif isinstance(node, ast.Call):
                self._write(node)
                for norm, add in self._read(node):
                    found.setdefault(norm, add)
        return [(add, norm) for norm, add in found.items()]

    def _write(self, call: ast.Call) -> None:
        """`x.add_(y)`, `torch.Tensor.add_(x, y)`."""
        if isinstance(call.func, ast.Attribute) and call.func.attr in _WRITING and self.sum_in(call) is call:
            for written in (call.func.value, *call.args[: len(call.args) > 1]):
                if isinstance(written, ast.Name):
                    self.sums[written.id] = call

    def _read(self, call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
        """(norm, sum) where a call that names a norm, to call it or to hand it on, is given a sum."""
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        named = [self._norms_of(call.func), *map(self._norms_of, given)]
        add = next((add for argument in given if (add := self.sum_in(argument)) is not None), None)
        if add is not None:
            yield from ((norm, add) for norms in named for norm in sorted(norms))

    def _norms_of(self, value: ast.AST) -> frozenset[str]:
        """The norms that an expression stands for, or for something of: `self.norm`, `type(self.norm).forward`."""
        attribute = self_attribute(value, self.self_name)
        if attribute in self.roots:
            return frozenset(path for path in self.norms if path.partition(".")[0] == attribute)
        if isinstance(value, ast.Name):
            return self.aliases.get(value.id, frozenset())
        if isinstance(value, ast.Subscript):
            held = self._norms_of(value.value)
            at = getattr(value.slice, "value", None)
            return frozenset(path for path in held if path.endswith(f".{at}")) or held or self._named_by(value.slice)
        if isinstance(value, ast.Attribute):
            return self._norms_of(value.value)
        if isinstance(value, ast.Call):
            return next((norms for argument in value.args if (norms := self._norms_of(argument))), frozenset()) or (
                frozenset().union(*map(self._named_by, value.args))
            )
        return frozenset()

    def _named_by(self, value: ast.AST) -> frozenset[str]:
        """`getattr(self, "norm")`, `self._modules["norm"]`."""
        name = value.value if isinstance(value, ast.Constant) else None
        return frozenset((name,)) if isinstance(name, str) and name in self.norms else frozenset()

    def sum_in(self, value: ast.AST) -> ast.AST | None:
        """The add whose result an expression is, or passes on."""
        if isinstance(value, ast.Name):
            return self.sums.get(value.id)
        if isinstance(value, (ast.NamedExpr, ast.Starred)):
            return self.sum_in(value.value)
        if isinstance(value, (ast.Tuple, ast.List, ast.IfExp)):
            return self._first_sum(ast.iter_child_nodes(value))
        if isinstance(value, ast.BinOp):
            negative = isinstance(value.op, ast.Sub) and _is_negative(value.right)
            return value if isinstance(value.op, ast.Add) or negative else None
        if not isinstance(value, ast.Call):
            return None
        name = _called(value)
        if name in _ADDING or name.strip("_") in ADD_MORE:
            return value
        if name in _TAKING:
            given = (*value.args, *(keyword.value for keyword in value.keywords))
            return value if any(map(_is_negative, given)) else None
        if name in ("sum", "mean"):
            of = value.func.value if isinstance(value.func, ast.Attribute) and not _is_module(value) else value.args[:1]
            several = of if isinstance(of, ast.AST) else next(iter(of), None)
            return value if isinstance(several, (ast.Tuple, ast.List)) or _called(several) in ("stack", "cat") else None
        if name == "reduce" and value.args:
            return value if _name(value.args[0]) in ("add", "iadd") else None
        if name in COPIES and isinstance(value.func, ast.Attribute):
            return self.sum_in(value.func.value)
        return self._first_sum(value.args[:1]) if "drop" in name.lower() or name.lower() == "identity" else None

    def _first_sum(self, values: Iterator[ast.AST] | list[ast.expr]) -> ast.AST | None:
        return next((add for value in values if (add := self.sum_in(value)) is not None), None)


def _called(value: ast.AST | None) -> str:
    """The last part of what a call names: `add` of `torch.add(x, y)` and of an overload; "" for anything else."""
    if not isinstance(value, ast.Call):
        return ""
    overloaded = isinstance(value.func, ast.Attribute) and value.func.attr in ("Tensor", "default")
    return _name(value.func.value if overloaded else value.func)  # type: ignore[attr-defined]


def _name(value: ast.AST) -> str:
    return str(getattr(value, "attr", getattr(value, "id", "")))


def _is_module(call: ast.Call) -> bool:
    """`torch.sum(x)`, not `x.sum()`."""
    return bool(call.args) and not isinstance(call.args[0], ast.Constant)


def _is_negative(value: ast.AST) -> bool:
    """`-y`, `y.neg()`, `torch.neg(y)`, `-1 * y`, -1."""
    if isinstance(value, ast.UnaryOp):
        return isinstance(value.op, ast.USub)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
        return _is_negative(value.left) or _is_negative(value.right)
    return _called(value) in ("neg", "negative")
