"""The whole story on one checkpoint: plan, generate, apply, verify, generate again, compare, revert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from .. import api
from ..backends.names import Backend
from ..errors import VerificationFailed
from . import tables
from .checkpoint import Checkpoint
from .speed import CPU_NOTE, NOISE_NOTE, Patch, SpeedComparison, chosen_threads, compare, generate

PROMPT = "Return the "


@dataclass(frozen=True)
class Story:
    """What happened on one checkpoint. `same_text` compares tokens; a proof may allow a tie between the two best
    tokens to fall the other way, which then counts as within tolerance. `restored`: revert gave stock tokens again."""

    checkpoint: str
    counts: dict[str, int]
    proof: Any
    stock_text: str
    patched_text: str
    same_text: bool
    restored: bool
    speed: tuple[SpeedComparison, ...]

    @property
    def passed(self) -> bool:
        return bool(self.proof.passed) and self.restored and (self.same_text or not self._exact)

    @property
    def _exact(self) -> bool:
        """Whether every call ran the reference backend, for which any difference is an error."""
        return all(set(site.backends) <= {"reference"} for site in self.proof.sites)

    def to_dict(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "passed": self.passed,
            "counts": self.counts,
            "same_text": self.same_text,
            "restored": self.restored,
            "stock_text": self.stock_text,
            "patched_text": self.patched_text,
            "speed": [row.to_dict() for row in self.speed],
            "proof": self.proof.to_dict(),
        }


def tell(
    loaded: Checkpoint,
    inputs: dict[str, torch.Tensor],
    prompt: str,
    new_tokens: int,
    console: Console,
    backend: Backend = "auto",
    rounds: int = 3,
) -> Story:
    """Run the story on a checkpoint and print it to `console`. prompt: the text that `inputs` were made from."""
    model, generates, name = loaded.model, loaded.generates, loaded.folder.resolve().name
    console.rule(escape(f"{name}: {type(model).__name__}, {loaded.dtype}, {loaded.device}".replace("torch.", "")))
    plan = api.plan(model, backend=backend)
    console.print(tables.plan_table(plan, console.width))

    def tokens() -> torch.Tensor:
        return generate(model, inputs, new_tokens)[0] if generates else torch.empty(1, 0)

    stock = tokens()
    report = api.apply(model, backend=backend)
    console.print(f"applied: {len(report.norms)} norms, {len(report.layers)} layers and stacks rewritten")
    try:
        proof = api.verify(model, inputs, greedy_tokens=new_tokens)
    except VerificationFailed as error:
        if error.proof is None:
            raise
        proof = error.proof
    console.print(escape(proof.explain()), highlight=False)
    patched = tokens()
    api.revert(model)
    reverted = tokens()
    with chosen_threads(model, inputs, generates):
        speed = compare(model, inputs, generates, new_tokens, rounds, Patch(backend))
    story = Story(
        checkpoint=name,
        counts=plan.counts(),
        proof=proof,
        stock_text=_text(loaded, stock),
        patched_text=_text(loaded, patched),
        same_text=torch.equal(stock, patched),
        restored=torch.equal(stock, reverted),
        speed=speed,
    )
    if generates:
        _print_texts(story, prompt, new_tokens, console)
    console.print(tables.speed_table(story.speed))
    notes = [CPU_NOTE] * (loaded.device.type == "cpu")
    for note in notes + [NOISE_NOTE] * any(row.verdict == "too noisy" for row in speed):
        console.print(f"[dim]{note}[/]")
    return story


def _text(loaded: Checkpoint, tokens: torch.Tensor) -> str:
    text = loaded.decode(tokens[0])
    return " ".join(map(str, tokens[0].tolist())) if text is None else text


def _print_texts(story: Story, prompt: str, new_tokens: int, console: Console) -> None:
    for name, text in (("before", story.stock_text), ("after", story.patched_text)):
        console.print(f"[bold]{name}[/]  {escape(prompt)}[cyan]{escape(text.removeprefix(prompt))}[/]", highlight=False)
    verdict = f"{new_tokens} tokens equal" if story.same_text else "the tokens DIFFER"
    console.print(f"{verdict}; after revert {'equal' if story.restored else 'DIFFERENT'}")
