"""What a layer's forward does with its residual stream, read from its syntax tree.

Values are numbered as they are assigned; a name that an `if`, loop or `try` may have changed gets a new unknown value
after it. So a fact found here ("the sum of this add is what that norm reads") holds on every path on which the two
are reached.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class Value:
    """One value of the forward. kind: "param" (its first argument), "add", "norm" (self.<attr>(source)), "module"
    (self.<attr> itself), "other"."""

    kind: str
    node: ast.AST | None = None
    attr: str = ""
    source: Value | None = None
    operands: tuple[Value, Value] | None = None


@dataclass(eq=False)
class Add:
    """`x = a + b`, `x = torch.add(a, b)`, `x += b` or `return a + b` as a statement, or the sum that a norm is given.

    index: its rank among all of these. left, right: what is added. shared: why an in-place add must stay what it is,
    or "". within: the norm call whose argument it is.
    """

    index: int
    statement: ast.stmt
    node: ast.BinOp | ast.Call | ast.AugAssign
    left: ast.expr
    right: ast.expr
    block: list[ast.stmt]
    value: Value
    unconditional: bool
    shared: str = ""
    within: ast.Call | None = None

    @property
    def in_place(self) -> bool:
        return isinstance(self.node, ast.AugAssign)


@dataclass(eq=False)
class NormCall:
    """`self.<attr>(value)`, by position or by keyword, also through a local name for `self.<attr>`; `argument` is the
    value's expression, `statement` holds the call, `first` says that nothing else runs before it in that statement."""

    attr: str
    node: ast.Call
    argument: ast.expr
    statement: ast.stmt
    block: list[ast.stmt]
    source: Value
    first: bool
    unconditional: bool


@dataclass
class Flow:
    """What `analyse` found.

    in_layer: (add, norm call) that can be one fused call. tail: the add whose sum the layer returns as its hidden
    state; tail_passive: nothing runs after it. entries: norm calls that read the layer's own argument.
    refused: (the add, norm attribute, why).
    """

    adds: list[Add] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    in_layer: list[tuple[Add, NormCall]] = field(default_factory=list)
    tail: Add | None = None
    tail_passive: bool = False
    entries: list[NormCall] = field(default_factory=list)
    refused: list[tuple[ast.AST, str, str]] = field(default_factory=list)


def analyse(tree: ast.FunctionDef, norm_attributes: frozenset[str], sums: frozenset[str] = frozenset()) -> Flow:
    """The flow of a layer whose children named in `norm_attributes` are norms. sums: how `torch.add` is written in it
    (`ForwardSource.sums`)."""
    return _Reader(tree, norm_attributes, sums).read()


def runs_first(tree: ast.FunctionDef, call: NormCall) -> bool:
    """True where nothing but rebinding names happens in the forward before `call`."""
    if not (call.first and call.unconditional and call.statement in tree.body):
        return False
    return all(is_passive(statement) for statement in tree.body[: tree.body.index(call.statement)])


_OPAQUE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp, ast.BoolOp)


def evaluation_order(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of an expression in the order in which Python finishes them."""
    if isinstance(node, ast.NamedExpr):
        yield from evaluation_order(node.value)
    elif isinstance(node, _OPAQUE):
        pass  # what stands inside may run never or often
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if key is not None:
                yield from evaluation_order(key)
            yield from evaluation_order(value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from evaluation_order(child)
    yield node


def is_passive(statement: ast.stmt) -> bool:
    """True for a statement that runs no code but rebinding names: `a = b`, `a = (b,)`, a docstring, `pass`."""
    if isinstance(statement, ast.Pass):
        return True
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Assign):
        named = all(isinstance(target, ast.Name) for target in statement.targets)
        return named and _only_names(statement.value)
    if isinstance(statement, ast.AnnAssign):
        return isinstance(statement.target, ast.Name) and (statement.value is None or _only_names(statement.value))
    return False


def _only_names(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple):
        return all(_only_names(element) for element in node.elts)
    return isinstance(node, (ast.Name, ast.Constant))


def own_name(tree: ast.FunctionDef) -> str:
    """What a method calls its object, "self" for example; "" where it takes no argument."""
    return next((argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)), "")


def self_attribute(node: ast.AST, self_name: str) -> str | None:
    """ "x" for the expression `self.x`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self_name:
        return node.attr
    return None


def assigned_names(statements: list[ast.stmt]) -> set[str]:
    """Names that any statement below may bind or delete."""
    names: set[str] = set()
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                names.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, *_NAMED_IF_ANY)):
                names.add(node.name or "")
            elif isinstance(node, ast.alias):
                names.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.MatchMapping):
                names.add(node.rest or "")
            elif isinstance(node, (ast.Nonlocal, ast.Global)):
                names.update(node.names)
    return names


_NAMED_IF_ANY = (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)


def _only_argument(call: ast.Call) -> ast.expr | None:
    """What a call with one argument is given."""
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg is not None)]
    if len(given) != 1 or len(given) != len(call.args) + len(call.keywords) or isinstance(given[0], ast.Starred):
        return None
    return given[0]


def _tuple_in_front(expression: ast.expr) -> ast.Tuple | None:
    """The tuple that `expression` is, or begins with: `(a, b)`, `(a,) + others[1:]`."""
    while isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
        expression = expression.left
    return expression if isinstance(expression, ast.Tuple) and expression.elts else None


class _Reader:
    def __init__(self, tree: ast.FunctionDef, norm_attributes: frozenset[str], sums: frozenset[str]) -> None:
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self.tree = tree
        self.norm_attributes = norm_attributes
        self.sums = sums
        self.self_name = own_name(tree)
        self.environment: dict[str, Value] = {a.arg: Value("other") for a in arguments[1:]}
        self.parameter = Value("param")
        if len(arguments) > 1:
            self.environment[arguments[1].arg] = self.parameter
        self.arguments = frozenset(self.environment.values())
        self.flow = Flow()
        self.returned: list[Value] = []

    def read(self) -> Flow:
        self._block(self.tree.body, unconditional=True)
        self._match_in_layer()
        self._match_tail()
        self.flow.entries = [call for call in self.flow.norms if call.source is self.parameter]
        return self.flow

    # statements

    def _block(self, block: list[ast.stmt], unconditional: bool) -> None:
        for statement in block:
            self._statement(statement, block, unconditional)
            if isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
                return

    def _statement(self, statement: ast.stmt, block: list[ast.stmt], unconditional: bool) -> None:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            value = self._expression(statement.value, statement, block, unconditional)
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                self._bind(target, value, statement.value)
        elif isinstance(statement, ast.AugAssign):
            self._augmented(statement, block, unconditional)
        elif isinstance(statement, ast.Return):
            value = Value("other")
            if statement.value is not None:
                value = self._expression(statement.value, statement, block, unconditional)
                if (several := _tuple_in_front(statement.value)) is not None:
                    value = self._first_of(several)
            self.returned.append(value)
        elif isinstance(statement, ast.Expr):
            self._expression(statement.value, statement, block, unconditional)
        elif isinstance(statement, ast.If):
            self._expression(statement.test, statement, block, unconditional)
            self._branches([statement.body, statement.orelse])
        elif isinstance(statement, ast.With):
            for item in statement.items:
                self._expression(item.context_expr, statement, block, unconditional)
            self._forget(assigned_names([ast.Expr(i.optional_vars) for i in statement.items if i.optional_vars]))
            self._block(statement.body, unconditional)
        elif not isinstance(statement, (ast.Pass, ast.Raise, ast.Continue, ast.Break, ast.Assert)):
            self._forget(assigned_names([statement]))
            if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
                self.returned.append(Value("other"))

    def _augmented(self, statement: ast.AugAssign, block: list[ast.stmt], unconditional: bool) -> None:
        """`x += y` writes to the tensor itself: to all of its names."""
        right = self._expression(statement.value, statement, block, unconditional)
        if not isinstance(statement.target, ast.Name):
            return
        name = statement.target.id
        left = self.environment.get(name, Value("other"))
        names = [other for other, value in self.environment.items() if left in (value, value.source) and other != name]
        if name in assigned_names([ast.Expr(statement.value)]):
            self.environment[name] = Value("other", statement)
        elif isinstance(statement.op, ast.Add):
            value = self.environment[name] = Value("add", statement, operands=(left, right))
            shared = f"the in-place add also writes what `{names[0]}` holds" if names else ""
            if left in self.arguments:
                shared = "the in-place add writes the tensor that its caller gave"
            target = ast.copy_location(ast.Name(name, ast.Load()), statement.target)
            self._add(statement, statement, (target, statement.value), block, value, unconditional).shared = shared
        else:
            self.environment[name] = Value("other", statement)
        self._forget(set(names))

    def _add(
        self,
        statement: ast.stmt,
        node: ast.BinOp | ast.Call | ast.AugAssign,
        sides: tuple[ast.expr, ast.expr],
        block: list[ast.stmt],
        value: Value,
        unconditional: bool,
    ) -> Add:
        add = Add(len(self.flow.adds), statement, node, *sides, block, value, unconditional)
        self.flow.adds.append(add)
        return add

    def _branches(self, branches: list[list[ast.stmt]]) -> None:
        before = dict(self.environment)
        ends: list[dict[str, Value]] = []
        for branch in branches:
            self.environment = dict(before)
            self._block(branch, unconditional=False)
            if not (branch and isinstance(branch[-1], (ast.Return, ast.Raise))):
                ends.append(self.environment)
        if not ends:
            self.environment = before
            return
        merged: dict[str, Value] = {}
        for name in set().union(*ends):
            values = [end.get(name) for end in ends]
            first = values[0]
            merged[name] = first if first is not None and all(v is first for v in values) else Value("other")
        self.environment = merged

    def _forget(self, names: set[str]) -> None:
        for name in names:
            self.environment[name] = Value("other")

    def _bind(self, target: ast.expr, value: Value, expression: ast.expr) -> None:
        if isinstance(target, ast.Name):
            if (several := _tuple_in_front(expression)) is not None:
                value = Value("tuple", expression, source=self._first_of(several))
            self.environment[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._forget({n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)})

    def _first_of(self, expression: ast.Tuple) -> Value:
        first = expression.elts[0]
        if isinstance(first, ast.Name):
            return self.environment.get(first.id, Value("other"))
        return Value("other")

    # expressions

    def _expression(
        self, expression: ast.expr, statement: ast.stmt, block: list[ast.stmt], unconditional: bool
    ) -> Value:
        """The value of `expression`; records the adds and norm calls in it."""
        values: dict[ast.AST, Value] = {}
        ran = False
        for node in evaluation_order(expression):
            if isinstance(node, ast.Name):
                values[node] = self.environment.get(node.id, Value("other"))
            elif isinstance(node, ast.NamedExpr):
                self._forget({node.target.id})
            elif (attribute := self_attribute(node, self.self_name)) in self.norm_attributes:
                values[node] = Value("module", node, attribute or "")
            elif (sides := self._sides(node)) is not None:
                left, right = (values.get(side, Value("other")) for side in sides)
                values[node] = Value("add", node, operands=(left, right))
                if node is expression and self._is_plain(statement):
                    self._add(statement, node, sides, block, values[node], unconditional)  # type: ignore[arg-type]
            elif isinstance(node, ast.Call) and (argument := _only_argument(node)) is not None:
                module = values.get(node.func)
                if module is not None and module.kind == "module":
                    source = values.get(argument, Value("other"))
                    if (sides := self._sides(argument)) is not None and argument in node.args:
                        add = self._add(statement, argument, sides, block, source, unconditional)  # type: ignore[arg-type]
                        add.within = node
                    call = NormCall(module.attr, node, argument, statement, block, source, not ran, unconditional)
                    if not isinstance(statement, (ast.If, ast.With)):
                        self.flow.norms.append(call)
                    values[node] = Value("norm", node, module.attr, source)
            ran = ran or (isinstance(node, ast.expr) and not isinstance(node, (ast.Name, ast.Attribute, ast.Constant)))
        return values.get(expression, Value("other", expression))

    def _sides(self, node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
        """What `node` adds, where it is `a + b` or `torch.add(a, b)`."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _tuple_in_front(node) is None:
            return node.left, node.right
        if isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords:
            left, right = node.args
            starred = isinstance(left, ast.Starred) or isinstance(right, ast.Starred)
            if not starred and ast.unparse(node.func) in self.sums:
                return left, right
        return None

    @staticmethod
    def _is_plain(statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Assign):
            return len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name)
        if isinstance(statement, ast.AnnAssign):
            return isinstance(statement.target, ast.Name)
        return isinstance(statement, ast.Return)

    # matching

    def _match_in_layer(self) -> None:
        for add in self.flow.adds:
            reading = [call for call in self.flow.norms if call.source is add.value]
            for call in reading[:1]:
                reason = self._why_not(add, call)
                if reason:
                    self.flow.refused.append((add.node, call.attr, reason))
                else:
                    self.flow.in_layer.append((add, call))

    @staticmethod
    def _why_not(add: Add, call: NormCall) -> str:
        if add.within is not None:
            return "" if add.within is call.node else "the norm's statement computes its sum anew"
        if add.shared:
            return add.shared
        if call.block is not add.block:
            return "the add and the norm stand in different branches"
        begin, end = add.block.index(add.statement), add.block.index(call.statement)
        if not all(is_passive(statement) for statement in add.block[begin + 1 : end]):
            return "code runs between the add and the norm"
        if not call.first:
            return "code runs in the norm's statement before the norm"
        return ""

    def _match_tail(self) -> None:
        values = [v.source if v.kind == "tuple" and v.source is not None else v for v in self.returned]
        if not values or any(value is not values[0] for value in values):
            return
        self.flow.tail = tail = next((add for add in self.flow.adds if add.value is values[0]), None)
        if tail is not None and not isinstance(tail.statement, ast.Return):
            after = tail.block[tail.block.index(tail.statement) + 1 :]
            last = after[-1] if after else None
            passive = all(is_passive(statement) for statement in after[:-1])
            self.flow.tail_passive = (
                passive and isinstance(last, ast.Return) and last.value is not None and _only_names(last.value)
            )
        else:
            self.flow.tail_passive = tail is not None
