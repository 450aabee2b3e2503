"""vLLM's graph after all of its passes: a product and the fused norm that reads it become one op (`linear_norm.graph`).

The pass knows none of vLLM's ops. Ours are written in place on route "ir", whose providers vLLM lowers so, and a
functional call on route "oot".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ...fused.linear_norm import splits as linear_norm_splits
from ...fused.linear_norm.graph import join, tunes_products
from .. import calls
from ..decision import Decision, decision_for
from ..log import logger, warn_once

_TOLD: set[tuple[int, int]] = set()


def tell(product: linear_norm_splits.Product, split: linear_norm_splits.Split) -> None:
    """One line for each matrix whose products come in parts."""
    matrix = product.n, product.k
    if split.kind == "parts" and matrix not in _TOLD:
        _TOLD.add(matrix)
        text = "rmsnorm_patch: behind a product with a %d x %d matrix the norm adds up %d parts (first at %d rows)"
        logger.info(text, *matrix, split.parts, product.m)


def splits_of(vllm_config: Any, decision: Decision) -> str:
    """Under which settings an engine's ops look at products: ahead, at the rows of its captured graphs."""
    if not decision.linear:
        return ""
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or ()
    return linear_norm_splits.settings_of(sizes, decision.reorder)


def wrap_configure(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of vLLM's manager of passes: it learns whether and how its engine joins products and norms."""

    def configure(self: Any, config: Any) -> None:
        original(self, config)
        decision = decision_for(config)
        self.rmsnorm_patch_linear = decision.linear
        self.rmsnorm_patch_splits = splits_of(config, decision)

    return configure


def wrap_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, graph: fx.Graph) -> None:
        original(self, graph)
        if _joins(self) and not tunes_products():
            try:
                join(graph, _splits(self))
            except Exception as error:  # each step leaves a right graph
                warn_once(f"not every product is joined with its norm: {type(error).__name__}: {error}")

    return call


def wrap_uuid(original: Callable[..., Any]) -> Callable[..., Any]:
    """The passes are part of the key of Inductor's own cache, which engines of different settings may share."""

    def uuid(self: Any) -> str:
        return f"{original(self)}|rmsnorm_patch {calls.VERSION} linear {_joins(self)} {_splits(self)}"

    return uuid


def _joins(manager: Any) -> bool:
    """What `wrap_configure` has told a manager; one that was configured before leaves products alone."""
    return getattr(manager, "rmsnorm_patch_linear", False)


def _splits(manager: Any) -> str:
    return getattr(manager, "rmsnorm_patch_splits", "")
