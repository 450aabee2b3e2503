"""A pass of ours behind those of vLLM's manager: whether it runs, what a failure costs, its part of the cache key. And
what vLLM's own passes run under."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import fx

from .. import calls
from ..decision import decision_for
from ..log import warn_once


@dataclass(frozen=True)
class _OfDecision:
    """name: the field of `Decision` that says whether an engine has this."""

    name: str

    def wrap_configure(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of vLLM's manager of passes: it learns what the field says of its engine."""

        def configure(manager: Any, config: Any) -> None:
            original(manager, config)
            setattr(manager, self._attribute, getattr(decision_for(config), self.name))

        return configure

    def wrap_uuid(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """As `linear_norm.wrap_uuid`."""

        def uuid(manager: Any) -> str:
            return f"{original(manager)}|rmsnorm_patch {calls.VERSION} {self.name} {self._setting(manager)}"

        return uuid

    @property
    def _attribute(self) -> str:
        return f"rmsnorm_patch_{self.name}"

    def _setting(self, manager: Any) -> Any:
        """What `wrap_configure` has told a manager; one that was configured before leaves norms as they are."""
        return getattr(manager, self._attribute, False)


@dataclass(frozen=True)
class ManagedPass(_OfDecision):
    """run: takes a graph, and the field of the decision where that says more than yes; leaves a right graph when it
    raises. failed: what the log then says."""

    run: Callable[..., object]
    failed: str

    def wrap_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(manager: Any, graph: fx.Graph) -> None:
            original(manager, graph)
            if setting := self._setting(manager):
                try:
                    self.run(graph, *(() if setting is True else (setting,)))
                except Exception as error:  # a right graph is left
                    warn_once(f"{self.failed}: {type(error).__name__}: {error}")

        return call


@dataclass(frozen=True)
class Surroundings(_OfDecision):
    """within: what vLLM's own passes run under, its choice of providers among them."""

    within: Callable[[], AbstractContextManager[None]]

    def wrap_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(manager: Any, graph: fx.Graph) -> None:
            with self.within() if self._setting(manager) else nullcontext():
                original(manager, graph)

        return call
