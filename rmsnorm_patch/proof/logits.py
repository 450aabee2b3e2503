"""The third and the fourth judgement: logits against a wider run, and greedy tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from ..numerics.tolerances import GREEDY_MARGIN, LOGIT_ERROR_RATIO
from .difference import HUGE, bit_mismatches, finite
from .report import GreedyProof, LogitProof

_POSITIONS = 256
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class Errors:
    """Relative error and largest absolute error of each position's logits, both [positions]."""

    relative: torch.Tensor
    largest: torch.Tensor

    def typical(self, experts: bool) -> float:
        """rms over positions; the median where tokens are routed, as one position whose routing was a tie is as wrong
        in one run as in another, and outweighs all others in an rms."""
        if not self.relative.numel():
            return 0.0
        value = self.relative.median() if experts else self.relative.pow(2).mean().sqrt()
        return finite(float(value))


def routes_to_experts(model: nn.Module) -> bool:
    """Whether the configuration, or that of its text part, names several experts."""
    config = getattr(model, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    counts = (getattr(part, name, None) for part in configs for name in _EXPERT_COUNTS)
    return any(isinstance(count, int) and count > 1 for count in counts)


def rows(logits: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """`logits` [batch, sequence, vocabulary] as [positions, vocabulary], padding left out."""
    mask = inputs.get("attention_mask")
    flat = logits.reshape(-1, logits.shape[-1])
    if isinstance(mask, torch.Tensor) and mask.shape == logits.shape[:-1]:
        return flat[mask.reshape(-1).bool().cpu()]
    return flat


def undefined(logits: torch.Tensor) -> torch.Tensor:
    """Which positions of `logits` [positions, vocabulary] hold NaN or +Inf, or nothing finite, [positions]. -Inf beside
    finite logits is how models mask tokens."""
    broken = torch.isnan(logits) | (logits == float("inf"))
    return broken.any(-1) | ~torch.isfinite(logits).any(-1)


def errors(actual: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> Errors:
    """Of `actual` against `reference`, lists of [positions, vocabulary], in fp64 by blocks of positions, over positions
    that are not `undefined` in the reference. Tokens masked in both count as equal; a position that is not finite
    elsewhere counts as infinitely wrong."""
    relative, largest = [], []
    for left, right in zip(actual, reference, strict=True):
        for start in range(0, left.shape[0], _POSITIONS):
            exact = right[start : start + _POSITIONS].to(torch.float64)
            found = left[start : start + _POSITIONS].to(torch.float64)
            defined = ~undefined(exact)
            exact, found = exact[defined], found[defined]
            masked = (exact == -torch.inf) & (found == -torch.inf)
            exact, found = exact.masked_fill(masked, 0.0), found.masked_fill(masked, 0.0)
            distance = found - exact
            relative.append(distance.norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-300))
            largest.append(distance.abs().amax(dim=-1))
    empty = torch.zeros(0, dtype=torch.float64, device="cpu")
    return Errors(torch.cat(relative or [empty]), torch.cat(largest or [empty]))


def judge(
    original: Sequence[torch.Tensor],
    patched: Sequence[torch.Tensor],
    wide: Sequence[torch.Tensor] | None,
    permitted: Sequence[torch.Tensor] | None,
    reference: str,
    experts: bool,
) -> LogitProof:
    """All arguments are lists of [positions, vocabulary]; `wide` None means that `permitted` is the yardstick."""
    whole = list(zip(original, patched, strict=True))
    defined = [~undefined(output) for output in original]

    def judged(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [output[rows] for output, rows in zip(outputs, defined, strict=True)]

    original, patched = judged(original), judged(patched)
    wide, permitted = (None if outputs is None else judged(outputs) for outputs in (wide, permitted))
    target = original if wide is None else wide
    patched_errors = errors(patched, target)
    own = [errors(original, target)] if wide is not None else []
    if permitted is not None:
        own.append(errors(permitted, target))
    own_error = max(e.typical(experts) for e in own)
    patched_error = patched_errors.typical(experts)
    between = errors(patched, original)
    divergence, agreement = distributions(original, patched)
    if patched_error == 0.0:
        ratio = 0.0 if own_error else 1.0
    else:
        ratio = finite(patched_error / own_error) if own_error else HUGE
    return LogitProof(
        reference=reference,
        positions=sum(map(len, defined)),
        patched_error=patched_error,
        own_error=own_error,
        ratio=ratio,
        allowed_ratio=LOGIT_ERROR_RATIO,
        kl_mean=finite(float(divergence.mean())) if divergence.numel() else 0.0,
        kl_max=finite(float(divergence.max())) if divergence.numel() else 0.0,
        top1_agreement=agreement,
        max_abs=largest(between),
        own_max_abs=max(largest(e) for e in own),
        bit_identical=all(not bit_mismatches(a, b) for a, b in whole),
        nonfinite_mismatches=sum(int((torch.isfinite(a) != torch.isfinite(b)).sum()) for a, b in whole),
        experts=experts,
        undefined=sum(int((~rows).sum()) for rows in defined),
    )


def largest(found: Errors) -> float:
    return finite(float(found.largest.max())) if found.largest.numel() else 0.0


def distributions(original: Sequence[torch.Tensor], patched: Sequence[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """(KL(original || patched) in nats [positions], share of positions with the same best token)."""
    divergence, same = [], []
    for left, right in zip(original, patched, strict=True):
        for start in range(0, left.shape[0], _POSITIONS):
            block = left[start : start + _POSITIONS]
            defined = ~undefined(block)
            p = block[defined].to(torch.float64).log_softmax(-1)
            q = right[start : start + _POSITIONS][defined].to(torch.float64).log_softmax(-1)
            divergence.append((p.exp() * (p - q).masked_fill(p == -torch.inf, 0.0)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
    if not sum(map(len, divergence)):
        return torch.zeros(0, device="cpu"), 1.0
    return torch.cat(divergence), float(torch.cat(same).to(torch.float64).mean())


def judge_greedy(
    original: tuple[torch.Tensor, ...], patched: tuple[torch.Tensor, ...], own_max_abs: float, strict: bool
) -> GreedyProof:
    """Both are (sequences [batch, length], logits [batch, steps, vocabulary]) of one prompt batch.

    Tokens that differ are red, but for one case: the original's two best logits there are so close that its own
    rounding error decides between them. The weights do not determine that token, and a kernel of any rounding, the
    stock one of another GPU included, may turn it. `strict` makes that red too.
    """
    steps = original[1].shape[1]
    tokens = original[0].shape[0] * steps
    allowed = GREEDY_MARGIN * own_max_abs
    parted, margin = _first_parting(original, patched)
    return GreedyProof(tokens, not parted, parted, margin, allowed, strict)


def _first_parting(original: tuple[torch.Tensor, ...], patched: tuple[torch.Tensor, ...]) -> tuple[str, float | None]:
    """Of all sequences in the batch the parting with the widest margin, as (where, margin); ("", None) if none."""
    found: tuple[str, float | None] = ("", None)
    length = min(original[1].shape[1], patched[1].shape[1])
    if original[0].shape[0] != patched[0].shape[0]:
        return "another number of sequences", None
    for row, (left, right) in enumerate(zip(original[0], patched[0], strict=True)):
        new_left, new_right = left[-original[1].shape[1] :], right[-patched[1].shape[1] :]
        differ = (new_left[:length] != new_right[:length]).nonzero()
        if not differ.numel():
            continue
        step = int(differ[0])
        best = original[1][row, step].to(torch.float64).topk(2).values
        margin = finite(float(best[0] - best[1]))
        if found[1] is None or margin > found[1]:
            found = (f"token {step} of sequence {row}", margin)
    if not found[0] and original[1].shape[1] != patched[1].shape[1]:
        return "another number of tokens", None
    return found
