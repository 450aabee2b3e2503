"""What the life-cycle tests share: exact snapshots of a model, and exact comparison of what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn

from rmsnorm_patch.rewrite import observe

IDS = torch.tensor([[5, 17, 200, 3, 44, 91, 8], [6, 6, 250, 12, 19, 77, 301]])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that was compiled before, and nothing left compiled behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [2, 7]."""
    return IDS.clone()


def _values(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """Identity of every value, one level into the dicts that nn.Module keeps (parameters, hooks, sub-modules)."""
    return {
        name: {key: id(item) for key, item in value.items()} if isinstance(value, dict) else value
        for name, value in mapping.items()
    }


@pytest.fixture
def snapshot() -> Callable[[nn.Module], list[Any]]:
    """Class, `__dict__` (keys in order, values by identity or equality) and hooks of every module."""

    def take(model: nn.Module) -> list[Any]:
        return [(path, type(m), list(m.__dict__), _values(m.__dict__)) for path, m in model.named_modules()]

    return take


class Ran:
    """What one forward gave, and which patched sites it went through."""

    def __init__(self, output: Any, events: list[observe.Event]) -> None:
        self.logits: torch.Tensor = output.logits
        self.hidden: tuple[torch.Tensor, ...] = output.hidden_states
        self.events = events
        self.kinds = Counter(event.kind for event in events)
        self.backends = Counter(event.backend for event in events)

    def same_as(self, other: Ran) -> bool:
        """Bit for bit, NaN equal to itself."""
        mine, theirs = (self.logits, *self.hidden), (other.logits, *other.hidden)
        return len(mine) == len(theirs) and all(
            a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))
            for a, b in zip(mine, theirs, strict=True)
        )


@pytest.fixture
def run() -> Callable[..., Ran]:
    """`run(model, ids, **forward arguments)` under no_grad (or `inference=True`)."""

    def forward(model: nn.Module, ids: torch.Tensor, inference: bool = False, **arguments: Any) -> Ran:
        events: list[observe.Event] = []
        mode = torch.inference_mode() if inference else torch.no_grad()
        with mode, observe.observing(events.append):
            output = model(ids, output_hidden_states=True, **arguments)
        return Ran(output, events)

    return forward
