"""Norms in front of the product of FP8 blocks that vLLM chooses first on a Hopper: they write the rows that it reads.

vLLM's op takes bf16 rows. Below 32 of them it has FlashInfer quantise and multiply them; from there on it quantises
them itself, for DeepGEMM. Both libraries also take rows that are quantised. So the pass parts the op: the norm writes
quantised rows, in the arithmetic that the product has for so many rows, and

    block_product(rows, scales, weight, weight_scales, power_of_two) -> out

calls the library that vLLM's op would have called, with the same weight and scales. The captured graph of each size
has one of the two.

Where a product cannot be parted, the norm in front of it writes plain rows. Engines gained nothing from that. So an
engine whose decision says `needs_blocks` leaves such norms to vLLM, before they become ours.

rows: e4m3 [M, K], scales: fp32 [M, K / 128], in columns that are padded to four floats; weight: e4m3 [N, K];
weight_scales, power_of_two: as vLLM's op takes them. out: bf16 [M, N].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import fx

from ...backends.bindings import kept
from ...fused.linear_norm.graph import arguments_by_name
from ...numerics.quantisation import FEW_ROWS, GROUP, quantise
from ...numerics.spec import NormSpec
from ...ops.library import register
from .. import trial
from ..log import warn_once
from ..settings import VARIABLE
from . import block_rows, norm_quantised
from .managed import ManagedPass, Surroundings
from .norms_in_graphs import erase_unread, keep_place, norm_of
from .quantisations import views_to

OP = "block_product"
_SCHEMA = "(Tensor rows, Tensor scales, Tensor weight, Tensor weight_scales, bool power_of_two) -> Tensor"


@cache
def _libraries() -> Any:
    """The module of vLLM's op: what that calls are names of it."""
    from vllm.model_executor.kernels.linear.scaled_mm import flashinfer

    return flashinfer


def _run(rows, scales, weight, weight_scales, power_of_two):  # type: ignore[no-untyped-def]
    if rows.shape[0] < FEW_ROWS:
        return _libraries().flashinfer_fp8_blockscale_gemm(
            input=rows, weight=weight, input_scale=scales, weight_scale=weight_scales, out_dtype=torch.bfloat16
        )
    out = _fake(rows, scales, weight, weight_scales, power_of_two)
    _libraries().fp8_gemm_nt((rows, scales), (weight, weight_scales), out, is_deep_gemm_e8m0_used=power_of_two)
    return out


def _fake(rows, scales, weight, weight_scales, power_of_two):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], weight.shape[0], dtype=torch.bfloat16)


_LIBRARY = register("FRAGMENT", {OP: (_SCHEMA, _run, _fake)})
"""Kept for the life of the process."""


def fuse(graph: fx.Graph) -> int:
    """Let norms write the rows of the products that read them; returns how many norms write quantised rows now. A
    product whose norm does not is what it was."""
    norms = [norm for node in graph.nodes if (norm := norm_of(node)) is not None]
    calls = list(_calls(graph, {norm.rows for norm in norms}))
    products: dict[fx.Node, tuple[Any, dict[str, Any]]] = {}
    try:
        for node in calls:
            products[_part(graph, node)] = node.target, node.meta
            graph.erase_node(node)
        return norm_quantised.fuse(graph) if products else 0
    finally:
        for product, (target, meta) in products.items():
            if block_rows.is_inserted(product.args[0].args[0]):  # type: ignore[union-attr]
                _join(graph, product, target, meta)


def _calls(graph: fx.Graph, rows: set[fx.Node]) -> Iterator[fx.Node]:
    """The products of these rows that can be parted."""
    for node in graph.nodes:
        if getattr(getattr(node.target, "_schema", None), "name", "") != f"vllm::{block_rows.NAME}":
            continue
        given = arguments_by_name(node)
        if views_to(given["input"])[1] not in rows:
            continue
        value = given["input"].meta["val"]
        why = _declined(value.shape[-1], given["group_size"], bool(given["use_deep_gemm_e8m0"]), value.device)
        if not why:
            yield node


def _part(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The product of quantised rows in place of one of bf16 rows, which is read no more."""
    given = arguments_by_name(node)
    power_of_two = bool(given["use_deep_gemm_e8m0"])
    with graph.inserting_before(node):
        rows, scales = block_rows.insert(graph, given["input"], power_of_two)
        op = getattr(torch.ops.rmsnorm_patch, OP).default
        product = graph.call_function(op, (rows, scales, given["weight"], given["weight_scale"], power_of_two))
    product.meta["val"] = node.meta["val"]
    keep_place(product, node)
    # By place: the compiler copies what does not lie so. What `node` has of these is of other arguments.
    vals = (getattr(argument, "meta", {}).get("val") for argument in product.args)
    product.meta["eager_input_vals"] = tuple(vals), {}
    node.replace_all_uses_with(product)
    return product


def _join(graph: fx.Graph, product: fx.Node, target: Any, meta: dict[str, Any]) -> None:
    """The product of bf16 rows again, with what was known of it."""
    rows, scales, weight, weight_scales, power_of_two = product.args
    quantised: Any = rows.args[0]  # type: ignore[union-attr]
    with graph.inserting_before(product):
        node = graph.call_function(target, (quantised.args[0], weight, weight_scales, GROUP, power_of_two))
    node.meta = meta
    product.replace_all_uses_with(node)
    erase_unread(graph, (product, rows, scales, quantised))  # type: ignore[arg-type]


@kept
def _declined(k: int, group: int, power_of_two: bool, device: torch.device) -> str:
    """Why products of rows of `k` columns stay as they are, or ""."""
    if group != GROUP:
        why = f"its groups have {group} columns, and ours {GROUP}"
    elif k % GROUP:
        why = f"they are no whole groups of {GROUP} columns"
    elif device.type == "cuda" and not power_of_two:
        why = "its scales are no powers of two: from 32 rows on a Hopper gave other bits than the library's"
    elif device.type == "cuda":
        why = trial.on_a_fresh_stack(OP, _trial, k, power_of_two, device)
    else:
        why = ""
    if why:
        warn_once(f"{block_rows.NAME} of {k} columns quantises its rows itself: {why}")
    return why


TRIED = (3, FEW_ROWS + 1)
"""Rows of the trial calls, one count for each library; columns of scales are padded for both."""


def _trial(k: int, power_of_two: bool, device: torch.device) -> str:
    """Multiply a few rows, each group of a size of its own, by both ops: a scale that lay elsewhere would be that of
    another. A byte may round otherwise, as the definition's quotients are not the device's."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.cuda.device(device):
        weight = torch.randn(2 * GROUP, k, generator=generator, device=device).to(torch.float8_e4m3fn)
        weight_scales = torch.rand(2, k // GROUP, generator=generator, device=device).log2_().ceil_().exp2_()
        for m in TRIED:
            sizes = torch.exp2(torch.randint(-4, 5, (m, k // GROUP), generator=generator, device=device))
            rows = torch.randn(m, k // GROUP, GROUP, generator=generator, device=device) * sizes[..., None]
            rows = rows.reshape(m, k).to(torch.bfloat16)
            try:
                taken = quantise(rows, block_rows.spec_of(power_of_two))
                got = _run(*taken, weight, weight_scales, power_of_two).float()
                theirs = getattr(torch.ops.vllm, block_rows.NAME)
                want = theirs(rows, weight, weight_scales, GROUP, power_of_two).float()
                far = (got - want).abs().amax(-1) > 0.02 * want.abs().amax(-1)
                if bool(far.any()):
                    return f"its library gives something else for {m} rows that are quantised before"
            except Exception as error:  # of other people's libraries
                return f"its library does not take rows that are quantised before ({error})"
    return ""


def versions() -> tuple[str, ...]:
    """Of the libraries, as far as they are packages: a graph that another process kept was tried with its own."""
    return tuple(each.version for name in LIBRARIES for each in metadata.distributions(name=name))


LIBRARIES = ("flashinfer-python", "deep_gemm")
"""vLLM has a DeepGEMM of its own too, whose version is vLLM's."""

_NEEDED = False
"""Whether what runs now chooses the norms of an engine that needs its products to be parted. A plain name: on the CPU
Dynamo traces through what reads it."""


@contextmanager
def needed() -> Iterator[None]:
    """Within, `is_needed`."""
    global _NEEDED
    before, _NEEDED = _NEEDED, True
    try:
        yield
    finally:
        _NEEDED = before


def is_needed() -> bool:
    return _NEEDED


def plain_rows(x: torch.Tensor, weight: torch.Tensor | None, spec: NormSpec, adds: bool) -> str:
    """Why norms of rows like x would write plain rows for products that quantise blocks themselves, or "". Tensors may
    be fake ones."""
    try:
        power_of_two = _power_of_two()
        why = _declined(x.shape[-1], GROUP, power_of_two, x.device)
        why = why or trial.declined_quantised(x, weight, spec, block_rows.spec_of(power_of_two), adds, bounded=False)
    except Exception as error:  # whoever asks compiles a model, and other people's libraries have been called
        why = f"{type(error).__name__}: {error}"
    if why:
        warn_once(
            f"norms of {x.shape[-1]} columns stay vLLM's: they would write plain rows for products of FP8 blocks, "
            f"which gained nothing ({why}); {VARIABLE}=ir serves them all the same"
        )
    return why


def _power_of_two() -> bool:
    """As vLLM sets it for these products."""
    from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

    return bool(is_deep_gemm_e8m0_used())


PASS = ManagedPass("blocks", fuse, "not every product of FP8 blocks reads rows that a norm has quantised")
NEEDED = Surroundings("needs_blocks", needed)
