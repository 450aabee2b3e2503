"""The source of a module class's `forward`: the innermost function under its decorators, and its syntax tree."""

from __future__ import annotations
import __future__

import ast
import functools
import hashlib
import inspect
import textwrap
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
"""Of `from __future__ import ...`, which a function compiled anew must keep."""

RENAMING = ("transformers.utils.deprecation",)
"""Modules whose decorators only rename arguments (transformers 5.24 has one around most layers' forward)."""


@dataclass(frozen=True)
class ForwardSource:
    """`function`: the plain function at the bottom. `wrappers`: decorators around it, outermost first.
    `tree`: its FunctionDef with the line numbers of its own file."""

    function: types.FunctionType
    wrappers: tuple[types.FunctionType, ...]
    tree: ast.FunctionDef

    @property
    def digest(self) -> str:
        """Of the function's statements, comments and layout left out, and of where its wrappers come from."""
        wrappers = [f"{Path(w.__code__.co_filename).name}:{w.__code__.co_firstlineno}" for w in self.wrappers]
        return hashlib.sha256("\n".join([ast.unparse(self.tree), *wrappers]).encode()).hexdigest()[:16]

    @property
    def sums(self) -> frozenset[str]:
        """How `torch.add` is written in this function: by a module's global name that no local one hides."""
        code, named = self.function.__code__, self.function.__globals__
        read = set(code.co_names) - {*code.co_varnames, *code.co_cellvars}
        found = {name for name in read if named.get(name) is torch.add}
        return frozenset(found | {f"{name}.add" for name in read if named.get(name) is torch})

    @property
    def passes_results(self) -> bool:
        """Whether nothing around the function can see or change what it returns."""
        return all(wrapper.__globals__.get("__name__") in RENAMING for wrapper in self.wrappers)

    def where(self, node: ast.AST) -> str:
        return self.at(getattr(node, "lineno", 0))

    def at(self, line: int) -> str:
        return f"{self.function.__code__.co_filename.rpartition('/')[2]}:{line}"


class NoSource(Exception):
    """The forward cannot be read or rebuilt; the message says why."""


def read_forward(cls: type) -> ForwardSource:
    """The forward that instances of `cls` run, inherited or not. Raises NoSource."""
    *around, function = _chain(cls)
    wrappers = tuple(w for w in around if not any(_is_made_by(hook, w) for hook in _hooks(cls)))
    return ForwardSource(function, wrappers, parse(function))


def read_again(cls: type, digest: str) -> ForwardSource | None:
    """The forward of `cls` where its source is that of `digest`; None in a process that has another, or none."""
    try:
        source = read_forward(cls)
    except NoSource:
        return None
    return source if source.digest == digest else None


def rewrapping_hooks(cls: type) -> list[types.FunctionType]:
    """Each `__init_subclass__` of `cls` that put a wrapper around its forward: a new subclass gets one of its own
    (`GradientCheckpointingLayer`)."""
    try:
        around = _chain(cls)[:-1]
    except NoSource:
        return []
    return [hook for hook in _hooks(cls) if any(_is_made_by(hook, wrapper) for wrapper in around)]


def _chain(cls: type) -> list[types.FunctionType]:
    """The forward of `cls` and what its decorators wrap, outermost first. Raises NoSource."""
    outermost = getattr(cls, "forward", None)
    if not isinstance(outermost, types.FunctionType):
        raise NoSource(f"{cls.__qualname__}.forward is {type(outermost).__name__}, not a Python function")
    chain = [outermost]
    while isinstance(inner := getattr(chain[-1], "__wrapped__", None), types.FunctionType):
        if inner in chain:
            raise NoSource(f"{cls.__qualname__}.forward: its decorators wrap each other in a circle")
        chain.append(inner)
    return chain


def _hooks(cls: type) -> Iterator[types.FunctionType]:
    for base in cls.__mro__:
        hook = getattr(vars(base).get("__init_subclass__"), "__func__", None)
        if isinstance(hook, types.FunctionType):
            yield hook


def _is_made_by(hook: types.FunctionType, wrapper: types.FunctionType) -> bool:
    return wrapper.__code__ in hook.__code__.co_consts


_PARSED: WeakKeyDictionary[types.FunctionType, tuple[types.CodeType, ast.FunctionDef]] = WeakKeyDictionary()


def parse(function: types.FunctionType) -> ast.FunctionDef:
    """The syntax tree of a plain function, which nobody changes. Raises NoSource unless its source is the code that
    runs; once it was, it stays so."""
    code, tree = _PARSED.get(function, (None, None))
    if tree is None or code is not function.__code__:
        tree = _parsed(function)
        _PARSED[function] = (function.__code__, tree)
    return tree


def _parsed(function: types.FunctionType) -> ast.FunctionDef:
    try:
        lines, first = inspect.getsourcelines(function)
        module = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, IndentationError) as error:
        raise NoSource(f"{function.__qualname__}: its source cannot be read ({type(error).__name__})") from error
    ast.increment_lineno(module, first - 1)
    found = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == function.__code__.co_name]
    if len(found) != 1:
        raise NoSource(f"{function.__qualname__}: its source is not one plain function")
    _check_is_the_running_code(function)
    return found[0]


def _check_is_the_running_code(function: types.FunctionType) -> None:
    """A file edited after its import, or code that an import hook rewrote, would give another function."""
    code = function.__code__
    lines, _ = inspect.findsource(function)
    written = _functions_in("".join(lines), code.co_filename, code.co_flags & FUTURE_FLAGS)
    if not any(candidate == code for candidate in written.get((code.co_name, code.co_firstlineno), ())):
        raise NoSource(f"{function.__qualname__}: the source on disk is not the code that runs")


@functools.lru_cache(maxsize=32)
def _functions_in(text: str, filename: str, flags: int) -> dict[tuple[str, int], list[types.CodeType]]:
    """(name, first line) -> the code of every function and class body in a file; {} where it cannot be compiled.

    The whole file, because what its imports bind changes the bytecode of a function below them.
    """
    found: dict[tuple[str, int], list[types.CodeType]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            waiting = [compile(text, filename, "exec", flags=flags, dont_inherit=True)]
    except (SyntaxError, ValueError):
        return found
    while waiting:
        code = waiting.pop()
        found.setdefault((code.co_name, code.co_firstlineno), []).append(code)
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found
