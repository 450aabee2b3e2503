"""The query's and the key's norm of one attention forward, which one launch can compute.

    q = self.q_norm(self.q_proj(x).view(s)).transpose(1, 2)
    k = self.k_norm(self.k_proj(x).view(s)).transpose(1, 2)

becomes

    if together(q_norm, k_norm):
        _q = self.q_proj(x).view(s)
        _k = self.k_proj(x).view(s)
        _q, _k = query_key(q_norm, k_norm, _q, _k)
        q = _q.transpose(1, 2)
        k = _k.transpose(1, 2)
    else:
        the model's own statements

Where the rotation follows, it is part of the call (`rotation`):

    q, k = apply_rotary_pos_emb(q, k, cos, sin)    _q, _k = ...
                                                   q, k = rotated(q_norm, k_norm, 2, _q, _k, cos, sin, apply_rotary_...)

Where a branch of the layer's rotates, that branch calls `rotated`, and the other one `query_key`.

What the key's norm reads is computed ahead of the query's norm, and of nothing else but what shapes its result. So it
must not read anything that stands in between. As for pairs, the source must show this, and a trace must confirm it.
"""

from __future__ import annotations

import ast
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn as nn

from ..backends.cuda.schedules import no_kernel, schedules
from ..backends.names import Backend
from ..numerics.spec import SUPPORTED_DTYPES
from ..patch_state import foreign, original_class
from ..scan.plan import Action, NormSite, QueryKeySite
from .dataflow import NormCall, analyse, assigned_names, is_passive, own_name
from .expressions import is_projection, only_shapes
from .recompile import Rewritten, compiled, substitute, uncalled
from .rotation import Rotation, confirm, rotation_behind
from .source import ForwardSource, NoSource, read_forward
from .sums import written_by
from .trace import holds, trace_reached

HELPERS = ("watch", "together", "query_key", "rotated")
"""Names of the functions that a rewritten forward calls; who compiles it hands them over."""
OP, ROTATED = "rms_norm_pair", "rms_norm_rotated"
_OLDEST = 80
"""Compute capability whose kernel a plan asks about; the rules of later ones serve the same rows."""

_QUERY, _KEY = ("q_", "qk_", "query_", "norm_q"), ("k_", "qk_", "key_", "norm_k")
"""How the attributes of a query's and a key's norm begin (`Together.named`)."""


@dataclass(eq=False)
class Together:
    """Two norm calls of one forward. reason: why they cannot be one launch, or "". rotation: what follows them and can
    be part of it; else why it cannot, "" where nothing rotates them."""

    query: NormCall
    key: NormCall
    reason: str
    rotation: Rotation | str = ""

    @property
    def named(self) -> bool:
        """Whether the norms are named as a query's and a key's: others that cannot be one launch are not reported."""
        return self.query.attr.startswith(_QUERY) and self.key.attr.startswith(_KEY)


class AttentionKey(NamedTuple):
    """What is rewritten in an attention class; plain data, so that a pickle can name it.

    norms: the class's norm attributes. ranks: which of what `find` gives are fused. digest: of the source; a process
    with another version of the model's code keeps its own forward. rotated: those of the ranks that are fused with
    their rotation.
    """

    norms: tuple[str, ...]
    ranks: tuple[int, ...]
    digest: str
    rotated: tuple[int, ...] = ()


@dataclass
class Attention:
    """One module whose forward was read. norms: attribute -> site. reasons: for each of `found` why it is left alone,
    "" where it can be fused, None where this instance does not run it. unrotated: the same of their rotations, None
    where there is none."""

    path: str
    module: nn.Module
    source: ForwardSource
    norms: dict[str, NormSite]
    found: list[Together]
    reasons: list[str | None]
    unrotated: list[str | None]

    def sites(self, rewritten: frozenset[str], backend: Backend) -> Iterator[QueryKeySite]:
        """The plan's lines. rewritten: paths of layers whose forwards are changed for their adds."""
        for each, reason, unrotated in zip(self.found, self.reasons, self.unrotated, strict=True):
            if reason is None:
                continue
            query, key = self.norms[each.query.attr], self.norms[each.key.attr]
            if not reason and self.path in rewritten:
                reason = "its forward is rewritten for its adds"
            if not reason and backend == "triton":
                reason = "backend triton has no kernel for two norms"
            reason = reason or self._why_apart(query, key)
            if reason and not each.named:
                continue
            action, reason = ("leave", reason) if reason else ("fuse", "both norms in one launch")
            where = self.source.where(each.query.node)
            site = QueryKeySite(self.path, query.path, key.path, action, reason, where)  # type: ignore[arg-type]
            if action == "fuse" and unrotated is not None:
                unrotated = unrotated or _no_rotation(query)
                rotation: Action = "leave" if unrotated else "fuse"
                site = replace(site, rotation=rotation, rotation_reason=unrotated or "in the norms' launch")
            yield site

    def key(self, fused: Iterable[QueryKeySite]) -> AttentionKey | None:
        """What is rewritten where these sites of this attention are fused; None where nothing is."""
        sites = {(site.query, site.key): site for site in fused}
        named = [(self.norms[each.query.attr].path, self.norms[each.key.attr].path) for each in self.found]
        ranks = tuple(rank for rank, paths in enumerate(named) if paths in sites and self.reasons[rank] == "")
        rotated = tuple(rank for rank in ranks if sites[named[rank]].rotation == "fuse" and self.unrotated[rank] == "")
        return AttentionKey(tuple(sorted(self.norms)), ranks, self.source.digest, rotated) if ranks else None

    def _why_apart(self, query: NormSite, key: NormSite) -> str:
        """Why the kernel does not take the two norms in one launch, or ""."""
        for site in (query, key):
            if site.action != "fuse" or site.spec is None:
                return f"the norm {site.path.rpartition('.')[2]} is left alone: {site.reason}"
        assert query.spec is not None
        assert key.spec is not None
        if query.spec.variant != key.spec.variant or _eps(self.module, query) != _eps(self.module, key):
            return "the two norms compute differently: their numerics or eps are not the same"
        if query.weight_dtype != key.weight_dtype:
            return f"weights of {query.weight_dtype} and of {key.weight_dtype}: one launch takes one dtype"
        if query.spec.group is not None:
            return "grouped norms: one launch takes rows with one rstd each"
        n, other, dtype = query.hidden_size, key.hidden_size, getattr(torch, query.weight_dtype or "bfloat16")
        if n is None or other is None:  # weightless norms: the call shows it
            return ""
        if dtype not in SUPPORTED_DTYPES:
            return f"weights of {query.weight_dtype}: no kernel takes that"
        if n != other:
            return f"rows of {n} and of {other}: one launch takes rows of one length"
        return "" if schedules(OP, dtype, n, _OLDEST) else f"rows of {n}: {no_kernel(OP, dtype, n, _OLDEST)}"


def _no_rotation(query: NormSite) -> str:
    """Why no kernel rotates rows like those of `query`, in the launch that norms them, or ""."""
    n, dtype = query.hidden_size, getattr(torch, query.weight_dtype or "bfloat16")
    if n is None or schedules(ROTATED, dtype, n, _OLDEST):
        return ""
    return f"rows of {n}: {no_kernel(ROTATED, dtype, n, _OLDEST)}"


def _eps(attention: nn.Module, site: NormSite) -> object:
    norm = getattr(attention, site.path.rpartition(".")[2], None)
    assert site.spec is not None
    return site.spec.eps if site.eps_attribute is None else getattr(norm, site.eps_attribute, None)


def read_attention(path: str, module: nn.Module, below: Mapping[str, NormSite]) -> Attention | None:
    """The attention at `path`, whose norm children are `below`; None where no two of its norms belong together, and for
    a forward without readable source."""
    norms = {name: site for name, site in below.items() if "." not in name}
    cls = original_class(type(module))
    try:
        source, found, obstacle = _read_class(cls, getattr(cls, "forward", None), frozenset(norms))
    except NoSource:
        return None
    if not found:
        return None
    stranger = foreign(module)
    obstacle = f"its forward is not its class's: {stranger}" if stranger is not None else obstacle
    reasons: list[str | None] = [obstacle] * len(found)
    unrotated: list[str | None] = [None] * len(found)
    if not obstacle:
        reasons, unrotated = _witness(module, cls, source, found, frozenset(norms))
    return Attention(path, module, source, norms, found, reasons, unrotated)


@functools.lru_cache(maxsize=1024)
def _read_class(cls: type, forward: object, norms: frozenset[str]) -> tuple[ForwardSource, list[Together], str]:
    """Source and finds, and why the forward cannot be rewritten, or "". forward: the class's at this moment."""
    source = read_forward(cls)
    found = list(find(source, source.tree, norms))
    ranks = tuple(rank for rank, each in enumerate(found) if not each.reason)
    rotated = tuple(rank for rank in ranks if isinstance(found[rank].rotation, Rotation))
    key = AttentionKey(tuple(norms), ranks, "", rotated)
    try:
        rewrite_attention(source, key, cls, dict.fromkeys(HELPERS, uncalled))
    except (NoSource, SyntaxError) as error:
        return source, found, f"its forward cannot be rewritten: {error}"
    return source, found, ""


# what the source shows


def find(source: ForwardSource, tree: ast.FunctionDef, norms: frozenset[str]) -> Iterator[Together]:
    """The norm calls of `tree` that belong together, and those that look as if they did, with why they do not."""
    calls = analyse(tree, norms, source.sums).norms
    used: NormCall | None = None
    self_name = own_name(tree)
    for query, key in itertools.pairwise(calls):
        if query is used:
            continue
        found = Together(query, key, _why_not(query, key, self_name))
        if not found.reason:
            used = key
            found.rotation = rotation_behind(tree, query, key, self_name)
        if not found.reason or found.named:
            yield found


def _why_not(query: NormCall, key: NormCall, self_name: str) -> str:
    if key.block is not query.block:
        return "the two norms stand in different branches"
    begin, end = query.block.index(query.statement), query.block.index(key.statement)
    if begin == end:
        return "both norms stand in one statement"
    for call in (query, key):
        if not only_shapes(call.statement, call.node):
            return f"the statement of {call.attr} does more than shape the norm's result"
    between = query.block[begin + 1 : end]
    if not all(is_passive(statement) or only_shapes(statement, None) for statement in between):
        return "code runs between the two norms"
    if not is_projection(key.argument, self_name):
        return f"what {key.attr} reads is computed in another way than by a module and in shape"
    read = {node.id for node in ast.walk(key.argument) if isinstance(node, ast.Name)}
    if read & assigned_names([query.statement, *between]):
        return f"{key.attr} reads what is computed after {query.attr}"
    return ""


# what a trace shows


def _witness(
    module: nn.Module, cls: type, source: ForwardSource, found: list[Together], norms: frozenset[str]
) -> tuple[list[str | None], list[str | None]]:
    """`Attention.reasons` and `unrotated`, each by a trace without the optional arguments; where it ends ahead of what
    is asked, with them."""
    reasons: list[str | None] = []
    unrotated: list[str | None] = [None] * len(found)
    rotations = frozenset(each.rotation.name for each in found if isinstance(each.rotation, Rotation))
    unsettled = True
    for optional in (False, True):
        try:
            nodes, ended = trace_reached(module, cls, source, norms, optional, rotations)
        except NoSource as why:
            return [str(why)] * len(found) if unsettled else reasons, unrotated
        if unsettled:
            reasons = [_confirm(each, nodes, ended) for each in found]
            unsettled = bool(ended) and ended in reasons
        unrotated = [_confirm_rotation(each, nodes, ended, source) for each in found]
        if not unsettled and not (ended and ended in unrotated):
            break
    return reasons, unrotated


def _confirm_rotation(each: Together, nodes: list[torch.fx.Node], ended: str, source: ForwardSource) -> str | None:
    """ "" where the trace shows the rotation that the source shows, None where nothing rotates; else why not."""
    if not isinstance(each.rotation, Rotation):
        return each.rotation or None
    at = [_place(call, nodes) for call in (each.query, each.key)]
    return confirm(each.rotation, at, nodes, ended, source)


def _confirm(each: Together, nodes: list[torch.fx.Node], ended: str) -> str | None:
    """ "" where the trace shows what the source shows, None where the forward runs neither norm; else why not."""
    at = [_place(call, nodes) for call in (each.query, each.key)]
    if at == [None, None] and not ended:
        return None
    if each.reason or None in at:
        return each.reason or ended or "a trace of its forward shows one of the two norms alone"
    query, key = (nodes[place] for place in at if place is not None)
    needed: set[torch.fx.Node] = set()
    waiting = [key]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                waiting.append(node)
    between = nodes[nodes.index(query) + 1 : nodes.index(key)]
    if query in needed or nodes.index(key) < nodes.index(query):
        return "a trace of its forward shows that one norm reads the other's result"
    if any(written_by(node) is not None or (node.op == "call_module" and node not in needed) for node in between):
        return "a trace of its forward shows that code runs between the two norms"
    return ""


def _place(call: NormCall, nodes: list[torch.fx.Node]) -> int | None:
    """Where the one call of the norm stands among the nodes."""
    at = [
        place
        for place, node in enumerate(nodes)
        if node.op == "call_module" and node.target == call.attr and holds(call.node, node.meta["line"])
    ]
    return at[0] if len(at) == 1 else None


# the rewritten forward


def rewrite_attention(
    source: ForwardSource, key: AttentionKey, original: type, helpers: Mapping[str, Callable[..., Any]]
) -> Rewritten:
    """The forward of `source`, which is that of `original`, with the norms of `key` fused, under its own decorators.

    helpers: what it calls, by the names in HELPERS. Raises NoSource."""
    tree = copy.deepcopy(source.tree)
    found = list(find(source, tree, frozenset(key.norms)))
    for rank in key.ranks:
        rotation = found[rank].rotation if rank in key.rotated else None
        if isinstance(rotation, Rotation):
            _fuse_rotated(tree, found[rank], rotation)
        else:
            _fuse(tree, found[rank])
    return compiled(tree, source, original, {name: helpers[name] for name in HELPERS})


def rotations_of(source: ForwardSource, key: AttentionKey) -> tuple[str, ...]:
    """Names of the functions whose calls a forward rewritten for `key` hands to `rotated`."""
    found = list(find(source, source.tree, frozenset(key.norms)))
    behind = (found[rank].rotation for rank in key.rotated)
    return tuple(rotation.name for rotation in behind if isinstance(rotation, Rotation))


_ROWS = ("_rmsnorm_query", "_rmsnorm_key")
"""Hold the rows of both, then their norms."""


def _fuse(tree: ast.FunctionDef, each: Together) -> None:
    block, norms = each.query.block, _norms(tree, each)
    begin, end = block.index(each.query.statement), block.index(each.key.statement) + 1
    own = block[begin:end]
    body = [*_rows_of(each), *_normed(norms, each, own), _statement(f"del {', '.join(_ROWS)}", each.key.statement)]
    block[begin:end] = [_question(norms, each, body, own)]


def _normed(norms: str, each: Together, own: list[ast.stmt]) -> list[ast.stmt]:
    """The statements `own`, those of both norms among them, where the rows are normed in one call."""
    together, rows = copy.deepcopy(own), ", ".join(_ROWS)
    for name, call in zip(_ROWS, (each.query, each.key), strict=True):
        before = own.index(call.statement)
        at = list(ast.walk(own[before])).index(call.node)
        substitute(together[before], list(ast.walk(together[before]))[at], ast.Name(name, ast.Load()))
    return [_statement(f"{rows} = _rmsnorm_query_key({norms}, {rows})", each.query.statement), *together]


def _fuse_rotated(tree: ast.FunctionDef, each: Together, rotation: Rotation) -> None:
    block = each.query.block
    begin, end = block.index(each.query.statement), block.index(rotation.last) + 1
    norms, rows = _norms(tree, each), ", ".join(_ROWS)
    body = [*_rows_of(each), *copy.deepcopy(rotation.between)]
    targets, call = ast.unparse(rotation.statement.targets[0]), rotation.call
    cos, sin = (ast.unparse(angle) for angle in call.args[2:])
    axis = 2 if rotation.transposed else 1
    made = f"{targets} = _rmsnorm_rotated({norms}, {axis}, {rows}, {cos}, {sin}, {rotation.name})"
    turned = [_statement(made, rotation.statement)]
    if rotation.branch is not None:
        chosen = copy.deepcopy(rotation.branch)
        chosen.body = [*chosen.body[:-1], *turned]
        chosen.orelse = _normed(norms, each, [each.query.statement, each.key.statement])
        turned = [chosen]
    body += [*turned, _statement(f"del {rows}", rotation.statement)]
    block[begin:end] = [_question(norms, each, body, block[begin:end])]


def _norms(tree: ast.FunctionDef, each: Together) -> str:
    return ", ".join(f'{own_name(tree)}._modules["{call.attr}"]' for call in (each.query, each.key))


def _rows_of(each: Together) -> list[ast.stmt]:
    """What both norms read, under the names of _ROWS."""
    made: list[ast.stmt] = []
    for name, call in zip(_ROWS, (each.query, each.key), strict=True):
        row = ast.Assign([ast.Name(name, ast.Store())], copy.deepcopy(call.argument))
        made.append(ast.fix_missing_locations(ast.copy_location(row, call.statement)))
    return made


def _question(norms: str, each: Together, body: list[ast.stmt], own: list[ast.stmt]) -> ast.If:
    question = _statement(f"if _rmsnorm_together({norms}): pass", each.query.statement)
    assert isinstance(question, ast.If)
    question.body, question.orelse = body, own
    return question


def _statement(text: str, beside: ast.stmt) -> ast.stmt:
    """`text`, on the lines of one of the model's own statements."""
    made = ast.parse(text).body[0]
    for node in ast.walk(made):
        ast.copy_location(node, beside)
    return made
