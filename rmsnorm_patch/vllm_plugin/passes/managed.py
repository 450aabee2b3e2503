"""A pass of ours behind those of vLLM's manager: whether it runs, what a failure costs, its part of the cache key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from .. import calls
from ..decision import decision_for
from ..log import warn_once


@dataclass(frozen=True)
class ManagedPass:
    """name: the field of `Decision` that says whether an engine has the pass. run: takes a graph, and leaves a right
    one when it raises. failed: what the log then says."""

    name: str
    run: Callable[[fx.Graph], object]
    failed: str

    def wrap_configure(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of vLLM's manager of passes: it learns whether its engine has the pass."""

        def configure(manager: Any, config: Any) -> None:
            original(manager, config)
            setattr(manager, self._attribute, getattr(decision_for(config), self.name))

        return configure

    def wrap_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(manager: Any, graph: fx.Graph) -> None:
            original(manager, graph)
            if self._runs(manager):
                try:
                    self.run(graph)
                except Exception as error:  # a right graph is left
                    warn_once(f"{self.failed}: {type(error).__name__}: {error}")

        return call

    def wrap_uuid(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """As `linear_norm.wrap_uuid`."""

        def uuid(manager: Any) -> str:
            return f"{original(manager)}|rmsnorm_patch {calls.VERSION} {self.name} {self._runs(manager)}"

        return uuid

    @property
    def _attribute(self) -> str:
        return f"rmsnorm_patch_{self.name}"

    def _runs(self, manager: Any) -> bool:
        """What `wrap_configure` has told a manager; one that was configured before leaves norms as they are."""
        return getattr(manager, self._attribute, False)
