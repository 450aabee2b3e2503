"""Generated faults of a source: each one small change of a constant, a bound, an operator, a branch, a call or a store.

Python is read as a syntax tree, so that only what runs is changed: no annotation, decorator or docstring. CUDA C++ is
read token by token; what a preprocessor, a string or a comment holds stays, except for inline assembly, which goes as
the statement that it is.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

COMPARED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is"}
COMPARED |= {"in": "not in", "not in": "in"}
COMPUTED = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "&": "|", "|": "&", "<<": ">>", ">>": "<<"}
CALLED = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Fault:
    """One change. start, end: where in the text. kind: of constant, comparison, operator, branch, call, store, order.
    line: from 1. source_line: its text, which names the fault when lines move. nth: of equal names, from 1."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str
    kind: str
    source_line: str
    nth: int = 1

    def applied(self, text: str) -> str:
        return text[: self.start] + self.after + text[self.end :]

    def named(self) -> str:
        before, after = (" ".join(part.split()) for part in (self.before, self.after))
        again = f" ({self.nth})" if self.nth > 1 else ""
        return f"{self.file}: `{self.source_line}`: `{before}` -> `{after}`{again}"


class _Reader:
    """Collects faults of one text; positions of the tree become offsets."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text, self.lines = file, text, text.split("\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.found: list[Fault] = []

    def add(self, start: int, end: int, after: str, kind: str) -> None:
        line = self.text.count("\n", 0, start) + 1
        before = self.text[start:end]
        self.found.append(Fault(self.file, line, start, end, before, after, kind, self.lines[line - 1].strip()))

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())


class _Python(_Reader):
    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.at(node.lineno, node.col_offset),  # type: ignore[attr-defined]
            self.at(node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
        )

    def between(self, left: ast.AST, right: ast.AST, changes: dict[str, str], kind: str) -> None:
        """Change the operator that stands between two operands, past their parentheses."""
        start, end = self.span(left)[1], self.span(right)[0]
        words = sorted(changes, key=len, reverse=True)
        match = re.search("|".join(map(re.escape, words)), self.text[start:end])
        if match:
            self.add(start + match.start(), start + match.end(), changes[match[0]], kind)

    def visit(self, node: ast.AST) -> None:
        method = getattr(self, f"in_{type(node).__name__.lower()}", None)
        if method is not None:
            method(node)
        for child in _running(node):
            self.visit(child)

    def in_constant(self, node: ast.Constant) -> None:
        start, end = self.span(node)
        if isinstance(node.value, bool):
            self.add(start, end, str(not node.value), "constant")
        elif isinstance(node.value, int):
            self.add(start, end, str(node.value + 1), "constant")
        elif isinstance(node.value, float):
            self.add(start, end, str(node.value * 2 or 1.0), "constant")

    def in_compare(self, node: ast.Compare) -> None:
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            self.between(left, right, COMPARED, "comparison")

    def in_binop(self, node: ast.BinOp) -> None:
        if not isinstance(node.right, ast.Tuple):
            self.between(node.left, node.right, COMPUTED, "operator")

    def in_boolop(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, {" and ": " or ", " or ": " and ", "and ": "or ", "or ": "and "}, "operator")

    def in_unaryop(self, node: ast.UnaryOp) -> None:
        start = self.span(node)[0]
        self.add(start, start + (4 if isinstance(node.op, ast.Not) else 1), "", "operator")

    def in_augassign(self, node: ast.AugAssign) -> None:
        self.between(node.target, node.value, {"+=": "-=", "-=": "+=", "*=": "+="}, "operator")

    def in_if(self, node: ast.If | ast.IfExp) -> None:
        if isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
            start, end = self.span(node.test)
            self.add(start, end, f"(not {self.text[start:end]})", "branch")

    in_ifexp = in_if

    def in_expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add(*self.span(node), "pass", "store" if "store" in ast.unparse(node.value.func) else "call")

    def in_assign(self, node: ast.Assign) -> None:
        if not all(isinstance(target, ast.Name) for target in node.targets):
            names = [t for target in node.targets for t in (getattr(target, "elts", None) or [target])]
            if all(isinstance(t, ast.Attribute | ast.Subscript) for t in names):
                self.add(*self.span(node), "pass", "store")

    def in_call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).split(".")[-1]
        if name in CALLED:
            end = self.span(node.func)[1]
            self.add(end - len(name), end, CALLED[name], "operator")

    def in_return(self, node: ast.Return) -> None:
        if isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            (start, middle), (second, end) = map(self.span, node.value.elts)
            left, right = self.text[start:middle], self.text[second:end]
            self.add(start, end, f"{right}{self.text[middle:second]}{left}", "order")


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Children that run when the function is called: no annotations, decorators, defaults, docstrings."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        yield from (child for child in body if not isinstance(node, ast.ClassDef) or isinstance(child, ast.FunctionDef))
    elif isinstance(node, ast.Module):
        yield from (child for child in node.body if isinstance(child, ast.FunctionDef | ast.ClassDef))
    elif isinstance(node, ast.AnnAssign):
        yield from (child for child in (node.target, node.value) if child is not None)
    elif not isinstance(node, ast.JoinedStr):  # texts of errors and reasons
        yield from ast.iter_child_nodes(node)


STATEMENT = re.compile(
    r"(?:__syncthreads|__syncwarp|row_group_barrier|open_cluster|wait_for_\w+|send_to_cta|griddep\w*|\w*launch_\w+|"
    r"\w*store\w*|prefetch\w*)\s*(?:<[^;(]*>)?\([^;{}]*\);|asm volatile\([^;]*?(?:;[^;\"]*\"[^;]*?)*\);"
)
STORED = re.compile(r"(?<![\w>])\*?[\w.\->]+(?:\[[^\]]*\])+\s*=(?!=)[^;{}]*;|(?<=\s)\*\w+\s*=(?!=)[^;{}]*;")
CUDA_OPERATORS = re.compile(r"<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||\+=|-=|\*=|/=|\+\+|--|->|::|[-+*/%<>&|!]")
CUDA_CHANGES = {**COMPARED, "&&": "||", "||": "&&", "+=": "-=", "*=": "+=", "%": "/", "+": "-", "-": "+", "/": "*"}
CUDA_CHANGES |= {"<<": ">>", ">>": "<<", "*": "+"}
NUMBER = re.compile(r"(?<![\w.])(0x[0-9a-fA-F]+|\d+\.\d*(?:e[-+]?\d+)?|\d+)(u|f|ull|ll)?(?![\w.])")


def _blanked(text: str) -> str:
    """The text with comments, strings, preprocessor lines and static assertions as spaces, offsets unmoved."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|static_assert\(.*?\);"
    pattern += r"|template\s*<[^{;]*?>(?=\s*(?:__device__|struct|static|inline|constexpr|__global__))"
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    return re.sub(pattern, blank, text, flags=re.DOTALL | re.MULTILINE)


class _Cuda(_Reader):
    def read(self) -> None:
        code = _blanked(self.text)
        for match in STATEMENT.finditer(self.text):
            if code[match.start()] != " " and not self._declares(match.start()):
                is_store = "store" in match[0].split("(")[0]
                self.add(match.start(), match.end(), ";", "store" if is_store else "call")
        for match in STORED.finditer(code):
            self.add(match.start(), match.end(), ";", "store")
        for match in NUMBER.finditer(code):
            number, suffix = match[1], match[2] or ""
            value = float(number) * 2 or 1.0 if "." in number else int(number, 0) + 1
            self.add(match.start(), match.end(), f"{value}{suffix}", "constant")
        for match in CUDA_OPERATORS.finditer(code):
            self._operator(code, match)

    def _declares(self, start: int) -> bool:
        """Whether a function is declared there, not called."""
        line = self.text[self.text.rfind("\n", 0, start) + 1 : start]
        return bool(re.search(r"__device__|__global__|\b(?:void|return|float|int)\s+$", line))

    def _operator(self, code: str, match: re.Match[str]) -> None:
        word, (start, end) = match[0], match.span()
        spaced = code[start - 1 : start] == " " and code[end : end + 1] == " "  # clang-format spaces binary ones
        if word == "!" and code[end] != "=":
            self.add(start, end, "", "operator")
        elif word in CUDA_CHANGES and spaced:
            kind = "comparison" if word in COMPARED else "operator"
            self.add(start, end, CUDA_CHANGES[word], kind)


def faults_of(file: str, text: str) -> list[Fault]:
    """Every fault of one source, in the order of the text. file: its path, which tells the language."""
    if file.endswith(".py"):
        reader = _Python(file, text)
        reader.visit(ast.parse(text))
        found = reader.found
    else:
        cuda = _Cuda(file, text)
        cuda.read()
        found = cuda.found
    seen: Counter[str] = Counter()
    result = []
    for fault in sorted(dict.fromkeys(found), key=lambda fault: (fault.start, fault.end, fault.after)):
        seen[fault.named()] += 1
        result.append(replace(fault, nth=seen[fault.named()]))
    return result
