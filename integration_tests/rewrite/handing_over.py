"""What the tests of handed-over sums share: what a model computes, and how many sums were taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from rmsnorm_patch.rewrite import observe

LAYERS = 4
Model = PreTrainedModel


def logits(model: Model, tokens: torch.Tensor, mode: Callable[[], AbstractContextManager] = torch.no_grad):
    with mode():
        return model(tokens, use_cache=False).logits.clone()


def taken(model: Model, tokens: torch.Tensor, mode: Callable[[], AbstractContextManager] = torch.no_grad) -> int:
    ran: Counter[str] = Counter()
    with observe.observing(lambda event: ran.update([event.kind])):
        logits(model, tokens, mode)
    return ran["taken"]
