"""What the tests of norms of queries and keys share: equal results, and why a plan leaves some."""

from __future__ import annotations

import torch
import torch.nn as nn

import rmsnorm_patch


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def reasons(model: nn.Module) -> set[str]:
    return {site.reason for site in rmsnorm_patch.plan(model).query_key if site.action == "leave"}
