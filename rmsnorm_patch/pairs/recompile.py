"""A layer's forward with its residual-adds fused with the norms that read them, compiled anew from its own source.

The original source is parsed, four kinds of statement are replaced, and the result is compiled as the original was:
same file, same lines (a traceback shows the model's own source), same globals (the live dict; a copy of it breaks
dynamo), same closure cells plus one cell for each helper, same defaults and decorators.

    x = a + b                    _n, x = in_layer(self._modules["norm"], a, b)
    residual = x           ->    residual = x
    y = self.norm(x)             y = _n; del _n

    x = a + b                    x = tail(self, a, b)
    return x                     return x

    y = self.norm(argument)      y = entry(self._modules["norm"], argument)

    y = self.norm(y)             y = y
    x = residual + y             x = norm_add(self._modules["norm"], 1, residual, y)

The last one has a form for a sum that a norm reads (`norm_add_norm`) and for a layer's last one (`norm_add_tail`). What
is exact for some tensors or modules only stands behind a question, with the original statements as the other answer
(`questions`): an add in place, and a norm that is called by keyword, which a hook on it would see.

    x += b                       right = b; del right afterwards
                                 if unseen(x, right): _n, x = in_layer(self._modules["norm"], x, right)
                                 else:                x += right; _n = self.norm(x)

In front of them stand two questions. Somebody may hold the bound forward beyond `revert`, which then runs what the
layer's class has now. And somebody may have given the model's own class another forward since, or that one other code.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn as nn

from ..patch_state import class_forward, outside, run_class_forward, running_now, unhooked
from . import questions
from .dataflow import Add, NormCall, analyse, assigned_names, own_name
from .norm_add import NormAdd, norm_adds
from .source import FUTURE_FLAGS, ForwardSource, NoSource, read_forward

HELPERS = ("watch", "in_layer", "tail", "entry", "norm_add", "norm_add_norm", "norm_add_tail")
"""Names of the functions that a rewritten forward calls; who compiles it hands them over."""


class LayerKey(NamedTuple):
    """What is rewritten in a layer class; plain data, so that a pickle can name it.

    norms: the class's norm attributes. in_layer: ranks of the adds fused with their norm. tail: whether the last add
    hands over. entries: norms that read the layer's argument, and so what the layer before handed over. digest: of the
    source; a process with another version of the model's code keeps its own forward. norm_adds: ranks of the adds fused
    with the norm whose result they take.
    """

    norms: tuple[str, ...]
    in_layer: tuple[int, ...]
    tail: bool
    entries: tuple[str, ...]
    digest: str
    norm_adds: tuple[int, ...] = ()


def layer_key(
    cls: type,
    norms: frozenset[str],
    in_layer: frozenset[int],
    tail: bool,
    entries: frozenset[str],
    norm_adds: frozenset[int] = frozenset(),
) -> LayerKey:
    """Raises NoSource."""
    ranks, added = tuple(sorted(in_layer)), tuple(sorted(norm_adds))
    return LayerKey(tuple(sorted(norms)), ranks, tail, tuple(sorted(entries)), read_forward(cls).digest, added)


def uncalled(*operands: object) -> None:
    """Stands for a helper in a forward that is compiled only to see whether it can be."""


class Rewritten(NamedTuple):
    """namespace: `forward` and what else the patched class gets. belongs_to: to be called with that class."""

    namespace: Mapping[str, Any]
    belongs_to: Callable[[type], None]


def rewrite(
    source: ForwardSource, key: LayerKey, original: type, helpers: Mapping[str, Callable[..., Any]]
) -> Rewritten:
    """The forward of `source`, which is that of `original`, with the pairs of `key` fused, under its own decorators.

    helpers: what it calls, by the names in HELPERS. Raises NoSource."""
    tree = copy.deepcopy(source.tree)
    flow = analyse(tree, frozenset(key.norms), source.sums)
    added = [each for each in norm_adds(tree, flow) if not each.reason and each.add.index in key.norm_adds]
    behind = {each.add.index: each for each in added}
    for number, (add, norm) in enumerate((a, n) for a, n in flow.in_layer if a.index in key.in_layer):
        if add.within is not None:
            _fuse_within(tree, add, norm, behind.pop(add.index, None))
        else:
            _fuse_in_layer(tree, add, norm, f"_rmsnorm_normed_{number}", behind.pop(add.index, None))
    for call in flow.entries:
        if call.attr in key.entries:
            _read_entry(tree, call)
    if key.tail and flow.tail is not None:
        _fuse_tail(tree, flow.tail, behind.pop(flow.tail.index, None))
    for each in behind.values():
        _fuse_norm_add(tree, each)
    for each in added:
        _leave_to_the_add(each)
    called = {name: helpers[name] for name in HELPERS}
    return compiled(tree, source, original, {**called, "unseen": questions.unseen, "unhooked": unhooked})


def compiled(
    tree: ast.FunctionDef, source: ForwardSource, original: type, helpers: Mapping[str, Callable[..., Any]]
) -> Rewritten:
    """`tree`, the changed forward of `source`, under the decorators of `source`. helpers: what it calls as
    `_rmsnorm_<name>`. Raises NoSource."""
    _check_names_are_its_own(tree)
    _ask_class(tree)
    patched = types.CellType()

    def now(layer: nn.Module) -> Callable[..., Any]:
        return running_now(layer, original, source.function)

    called = {f"_rmsnorm_{name}": types.CellType(helper) for name, helper in helpers.items()}
    called |= {"_rmsnorm_type": types.CellType(type), "_rmsnorm_isinstance": types.CellType(isinstance)}
    called |= {"_rmsnorm_class": patched, "_rmsnorm_now": types.CellType(now)}
    read = {"original": original, "read": class_forward(original), "outside": outside, "replaced": run_class_forward}
    read |= {"own": source.function, "code": source.function.__code__}
    called |= {f"_rmsnorm_{name}": types.CellType(value) for name, value in read.items()}
    made = _compile(tree, source.function, called)
    namespace = {"forward": _decorate(made, source), "_rmsnorm_patch_forward": made}
    return Rewritten(namespace, functools.partial(setattr, patched, "cell_contents"))


_ASKING = ("currentframe", "dir", "eval", "exec", "locals", "vars", "_getframe")
"""Functions that show a forward the names of its variables, to which a rewritten one adds some."""


def _check_names_are_its_own(tree: ast.FunctionDef) -> None:
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        of_an_object = name in ("dir", "vars") and (call.args or isinstance(call.func, ast.Attribute))
        if name in _ASKING and not of_an_object:
            raise NoSource(f"it may ask for its own variables by {name}(), line {call.lineno}")
    if own_name(tree) in assigned_names(tree.body):
        raise NoSource(f"it gives {own_name(tree)!r}, what it calls its object, another value")


def _ask_class(tree: ast.FunctionDef) -> None:
    """First of all: a layer that is no longer of the class that this forward is made for runs the forward that it has
    now. That one stands below the decorators too, which have run already. A layer whose own class got another forward
    since runs that. Then the classes of norms are asked, too."""
    parameters = tree.args
    given = [ast.Name(p.arg, ast.Load()) for p in (*parameters.posonlyargs, *parameters.args)]
    named = [ast.keyword(p.arg, ast.Name(p.arg, ast.Load())) for p in parameters.kwonlyargs]
    rest: list[ast.expr] = []
    if parameters.vararg is not None:
        rest.append(ast.Starred(ast.Name(parameters.vararg.arg, ast.Load()), ast.Load()))
    if parameters.kwarg is not None:
        named.append(ast.keyword(None, ast.Name(parameters.kwarg.arg, ast.Load())))
    questions_asked = ast.parse(
        "if _rmsnorm_type(layer) is not _rmsnorm_class and not _rmsnorm_isinstance(layer, _rmsnorm_class):\n"
        "    return _rmsnorm_now(layer)\n"
        "if (_rmsnorm_original.forward is not _rmsnorm_read or _rmsnorm_own.__code__ is not _rmsnorm_code) "
        "and _rmsnorm_outside(layer):\n"
        "    return _rmsnorm_replaced\n"
        "_rmsnorm_watch()"
    ).body
    behind: tuple[list[ast.expr], ...] = ([], [ast.Name("_rmsnorm_original", ast.Load())])
    for question, more in zip(questions_asked, behind, strict=False):
        assert isinstance(question, ast.If)
        for name in ast.walk(question):
            if isinstance(name, ast.Name) and name.id == "layer":
                name.id = given[0].id
        (answer,) = question.body
        assert isinstance(answer, ast.Return)
        assert answer.value is not None
        answer.value = ast.Call(answer.value, [given[0], *more, *given[1:], *rest], named)
    documented = ast.get_docstring(tree) is not None and len(tree.body) > 1
    for statement in questions_asked:
        for node in ast.walk(statement):
            ast.copy_location(node, tree.body[documented])
    tree.body[documented:documented] = map(ast.fix_missing_locations, questions_asked)


def _self(tree: ast.FunctionDef) -> ast.expr:
    return ast.Name(own_name(tree), ast.Load())


def _module(tree: ast.FunctionDef, norm: NormCall) -> ast.expr:
    """`self._modules["norm"]`: `self.norm` without `nn.Module.__getattr__`."""
    modules = ast.Attribute(_self(tree), "_modules", ast.Load())
    return ast.Subscript(modules, ast.Constant(norm.attr), ast.Load())


def _helper(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(f"_rmsnorm_{name}", ast.Load()), list(arguments), [])


def _norm_add(tree: ast.FunctionDef, made: NormAdd, name: str, *first: ast.expr) -> ast.Call:
    """The call of a helper that norms one of the operands which it is given, and adds."""
    assert made.norm is not None
    sides = [made.add.left, made.add.right]
    if sides[made.side] is made.norm.node:
        sides[made.side] = made.norm.argument
    return _helper(name, *first, _module(tree, made.norm), ast.Constant(made.side), *sides)


def _leave_to_the_add(made: NormAdd) -> None:
    """In the norm's own statement, where it has one, its argument takes the result's name."""
    assert made.norm is not None
    if made.norm.statement is not made.add.statement:
        _Substitute(made.norm.node, made.norm.argument).visit(made.norm.statement)


def _fuse_in_layer(tree: ast.FunctionDef, add: Add, norm: NormCall, name: str, behind: NormAdd | None) -> None:
    target = add.statement.targets[0] if isinstance(add.statement, ast.Assign) else add.statement.target  # type: ignore[attr-defined]
    right = ast.Name(_RIGHT, ast.Load()) if add.in_place else add.right
    both = ast.Tuple([ast.Name(name, ast.Store()), target], ast.Store())
    call = _helper("in_layer", _module(tree, norm), add.left, right)
    if behind is not None:
        call = _norm_add(tree, behind, "norm_add_norm", _module(tree, norm))
    statements: list[ast.stmt] = [ast.Assign([both], call)]
    conditions: list[ast.expr] = []
    if add.in_place:
        conditions.append(_helper("unseen", add.left, right))
    if norm.node.keywords:
        conditions.append(_helper("unhooked", _module(tree, norm)))
    if conditions:
        assert isinstance(target, ast.Name)
        total = ast.Name(target.id, ast.Load())
        keywords = [ast.keyword(keyword.arg, total) for keyword in norm.node.keywords]
        normed = ast.Call(norm.node.func, [] if keywords else [total], keywords)  # type: ignore[arg-type]
        original = [_own_add(add, right), ast.Assign([ast.Name(name, ast.Store())], normed)]
        statements = [ast.If(_all(conditions), statements, original)]
    _replace(add.block, add.statement, _with_right(add, statements))
    _Substitute(norm.node, ast.Name(name, ast.Load())).visit(norm.statement)
    if not isinstance(norm.statement, ast.Return):
        drop = ast.Delete([ast.Name(name, ast.Del())])
        ast.fix_missing_locations(ast.copy_location(drop, norm.statement))
        add.block.insert(add.block.index(norm.statement) + 1, drop)


_RIGHT = "_rmsnorm_right"
"""Holds what is added in place, which is computed before the question is asked."""


def _own_add(add: Add, right: ast.expr) -> ast.stmt:
    """The model's statement, its right side computed before."""
    if isinstance(add.statement, ast.AugAssign):
        return ast.AugAssign(add.statement.target, ast.Add(), right)
    return add.statement


def _with_right(add: Add, statements: list[ast.stmt]) -> list[ast.stmt]:
    if not add.in_place:
        return statements
    keep: ast.stmt = ast.Assign([ast.Name(_RIGHT, ast.Store())], add.right)
    return [keep, *statements, ast.Delete([ast.Name(_RIGHT, ast.Del())])]


def _all(conditions: list[ast.expr]) -> ast.expr:
    return conditions[0] if len(conditions) == 1 else ast.BoolOp(ast.And(), conditions)


def _fuse_within(tree: ast.FunctionDef, add: Add, norm: NormCall, behind: NormAdd | None) -> None:
    """`self.norm(a + b)`: only the norm's result is wanted."""
    both = _helper("in_layer", _module(tree, norm), add.left, add.right)
    if behind is not None:
        both = _norm_add(tree, behind, "norm_add_norm", _module(tree, norm))
    call = ast.Subscript(both, ast.Constant(0), ast.Load())
    ast.fix_missing_locations(ast.copy_location(call, norm.node))
    _Substitute(norm.node, call).visit(norm.statement)


def _read_entry(tree: ast.FunctionDef, norm: NormCall) -> None:
    call: ast.expr = _helper("entry", _module(tree, norm), norm.argument)
    if norm.node.keywords:
        own = ast.Call(norm.node.func, [], norm.node.keywords)
        call = ast.IfExp(_helper("unhooked", _module(tree, norm)), call, own)
    ast.fix_missing_locations(ast.copy_location(call, norm.node))
    _Substitute(norm.node, call).visit(norm.statement)


def _fuse_norm_add(tree: ast.FunctionDef, made: NormAdd) -> None:
    call = _norm_add(tree, made, "norm_add")
    ast.fix_missing_locations(ast.copy_location(call, made.add.node))
    _Substitute(made.add.node, call).visit(made.add.statement)


def _fuse_tail(tree: ast.FunctionDef, add: Add, behind: NormAdd | None) -> None:
    right = ast.Name(_RIGHT, ast.Load()) if add.in_place else add.right
    call = _helper("tail", _self(tree), add.left, right)
    if behind is not None:
        call = _norm_add(tree, behind, "norm_add_tail", _self(tree))
    if isinstance(add.statement, ast.AugAssign):
        handed = ast.If(
            _helper("unseen", add.left, right), [ast.Assign([add.statement.target], call)], [_own_add(add, right)]
        )
        _replace(add.block, add.statement, _with_right(add, [handed]))
    else:
        ast.fix_missing_locations(ast.copy_location(call, add.node))
        _Substitute(add.node, call).visit(add.statement)


def _replace(block: list[ast.stmt], old: ast.stmt, new: list[ast.stmt]) -> None:
    for statement in new:
        ast.fix_missing_locations(ast.copy_location(statement, old))
    at = block.index(old)
    block[at : at + 1] = new


def substitute(statement: ast.stmt, old: ast.AST, new: ast.expr) -> None:
    """Put `new` where `old` is in `statement`."""
    _Substitute(old, new).visit(statement)


class _Substitute(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.expr) -> None:
        self.old = old
        self.new = new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return self.generic_visit(node)


def _compile(
    tree: ast.FunctionDef, function: types.FunctionType, called: dict[str, types.CellType]
) -> types.FunctionType:
    """`tree` as a function with the globals, closure and attributes of `function`, and cells for what is `called`."""
    code = function.__code__
    tree.decorator_list = []
    tree.returns = None
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    tree.args.defaults = [ast.copy_location(ast.Constant(None), d) for d in tree.args.defaults]
    tree.args.kw_defaults = [
        None if d is None else ast.copy_location(ast.Constant(None), d) for d in tree.args.kw_defaults
    ]
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    cells.update(called)
    # A class around it keeps private names mangled as they were; the function around that makes the names free.
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    scope = ast.parse(f"def _scope({', '.join(cells)}):\n class {owner if owner.isidentifier() else '_'}: pass").body[0]
    assert isinstance(scope, ast.FunctionDef)
    scope.body[0].body = [tree]  # type: ignore[attr-defined]
    module = ast.fix_missing_locations(ast.Module([scope], []))
    flags = code.co_flags & FUTURE_FLAGS
    compiled = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
    made = _code_below(_code_below(_code_below(compiled)), code.co_name)
    missing = [name for name in made.co_freevars if name not in cells]
    if missing or made.co_varnames[: made.co_argcount] != code.co_varnames[: code.co_argcount]:
        raise NoSource(f"{function.__qualname__}: its names could not be kept ({', '.join(missing)})")
    if hasattr(made, "co_qualname"):
        made = made.replace(co_qualname=code.co_qualname)  # type: ignore[call-arg,attr-defined]
    result = types.FunctionType(
        made, function.__globals__, function.__name__, function.__defaults__, tuple(cells[n] for n in made.co_freevars)
    )
    result.__kwdefaults__ = function.__kwdefaults__
    result.__annotations__ = dict(function.__annotations__)
    result.__doc__ = function.__doc__
    result.__module__ = function.__module__
    result.__qualname__ = function.__qualname__
    result.__dict__.update({k: v for k, v in function.__dict__.items() if k != "__wrapped__"})
    return result


def _code_below(code: types.CodeType, name: str | None = None) -> types.CodeType:
    """The code object of the function or class defined directly in `code`."""
    return next(c for c in code.co_consts if isinstance(c, types.CodeType) and name in (None, c.co_name))


def _decorate(function: types.FunctionType, source: ForwardSource) -> types.FunctionType:
    """Copies of the original's decorators around `function`, found as the closure cell that holds what they wrap."""
    inner: types.FunctionType = source.function
    made = function
    for wrapper in reversed(source.wrappers):
        cells = list(wrapper.__closure__ or ())
        at = [i for i, cell in enumerate(cells) if _content(cell) is inner]
        if len(at) != 1:
            raise NoSource(
                f"{inner.__qualname__}: a decorator in {wrapper.__module__} cannot be put on another function"
            )
        cells[at[0]] = types.CellType(made)
        outer = types.FunctionType(
            wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells)
        )
        outer.__kwdefaults__ = wrapper.__kwdefaults__
        outer.__dict__.update(wrapper.__dict__)
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(outer, name, getattr(wrapper, name))
        outer.__wrapped__ = made  # type: ignore[attr-defined]
        inner, made = wrapper, outer
    return made


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None
