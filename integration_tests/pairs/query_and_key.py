"""What tests of norms of queries and keys share: what a model computes, equal results, why a plan leaves some."""

from __future__ import annotations

import torch
import torch.nn as nn
from transformers import PreTrainedModel

import rmsnorm_patch

TOKENS = torch.arange(3, 12).repeat(2, 1)


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of a forward, and what greedy decoding with a cache gives."""
    torch.manual_seed(0)
    made = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return [model(TOKENS).logits, made]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def reasons(model: nn.Module) -> set[str]:
    return {site.reason for site in rmsnorm_patch.plan(model).query_key if site.action == "leave"}
