"""Survey every causal-LM type of transformers and write docs/support_matrix.md.

    python scripts/support_matrix.py            write the page
    python scripts/support_matrix.py --check    exit 1 where the page is stale
    python scripts/support_matrix.py llama ...  print the rows of these types

Each type is built from a small configuration with random weights, run, patched with the reference backend, run again,
and reverted: the logits and hidden states must be the same bits, and the fused calls that ran are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchlib.pages import wrapped  # noqa: E402
from small_configs import MODEL_TYPES, VOCABULARY, small_config  # noqa: E402

import rmsnorm_patch  # noqa: E402
from rmsnorm_patch.errors import UnsupportedModel  # noqa: E402
from rmsnorm_patch.rewrite import observe  # noqa: E402

PAGE = ROOT / "docs" / "support_matrix.md"
LARGEST = 30_000_000
"""Parameters; a type that stays larger after its sizes are cut is listed as not built."""
PAIR_KINDS = ("in_layer", "cross_layer", "final", "norm_add")
COUNTED = {
    "types": "there are",
    "built": "were built",
    "with RMSNorm": "have an RMSNorm",
    "norms fused": "have norms that are fused",
    "in_layer": "have adds fused with the norm behind them in one layer (in-layer)",
    "cross_layer": "have last adds fused with the next layer's norm (cross-layer)",
    "final": "have the last add fused with the final norm (final)",
    "norm_add": "have norms fused with the add behind them: sandwich layouts (norm then add)",
    "norm_add left": "have adds behind norms that are left",
    "query_key": "have the norms of queries and keys in one launch (q with k)",
    "rotation": "have their rotation in it too (rotated)",
}
"""What `totals` counts, in the page's words."""


@dataclass
class Row:
    """One model type.

    counts: as `Plan.counts`. ran: fused calls seen in one forward, by event kind. identical: logits and hidden states
    are the same bits before, patched and reverted. unbuilt: why transformers could not build or run it.
    """

    model_type: str
    counts: dict[str, int] = field(default_factory=dict)
    ran: dict[str, int] = field(default_factory=dict)
    identical: bool = False
    reasons: tuple[str, ...] = ()
    unbuilt: str = ""

    def fused(self, kind: str) -> int:
        return self.counts.get(f"{kind}/fuse", 0)

    def left(self, kind: str) -> int:
        return self.counts.get(f"{kind}/leave", 0)

    @property
    def has_norms(self) -> bool:
        return bool(self.fused("norm") or self.left("norm"))


def survey(model_type: str, dtype: torch.dtype = torch.float32) -> Row:
    """Build, run, patch, run, revert, run. Raises only what this package should not have raised."""
    try:
        model = build(model_type, dtype)
        tokens = torch.arange(3, 12).repeat(2, 1) * 7 % VOCABULARY
        before = outputs(model, tokens)
    except Exception as error:  # whatever the library raises for a configuration that is not its own
        return Row(model_type, unbuilt=_first_line(error))
    return patched_and_back(model_type, model, before, lambda: outputs(model, tokens))


def patched_and_back(
    name: str, model: torch.nn.Module, before: list[torch.Tensor], run: Callable[[], list[torch.Tensor]]
) -> Row:
    """Patch, run, revert, run. before: what `run` gave; it must give the same bits both times."""
    try:
        plan = rmsnorm_patch.apply(model, backend="reference").plan
    except UnsupportedModel:  # nothing to fuse
        return unpatched(name, model)
    row = Row(name, plan.counts(), reasons=_reasons(plan))
    ran: Counter[str] = Counter()
    with observe.observing(lambda event: ran.update([event.kind])):
        patched = run()
    rmsnorm_patch.revert(model)
    row.ran = dict(ran)
    row.identical = same(before, patched) and same(before, run())
    return row


def unpatched(name: str, model: torch.nn.Module) -> Row:
    """What is left alone in a model that has nothing to fuse."""
    try:
        plan = rmsnorm_patch.plan(model, backend="reference")
    except UnsupportedModel:  # no RMSNorm
        return Row(name, identical=True)
    return Row(name, plan.counts(), identical=True, reasons=_reasons(plan))


def build(model_type: str, dtype: torch.dtype) -> PreTrainedModel:
    config = small_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters after its sizes were cut")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The logits, then every hidden state that the model reports."""
    torch.manual_seed(0)
    result = model(tokens, output_hidden_states=True)
    states = getattr(result, "hidden_states", None) or ()
    return [result.logits, *(state for state in states if isinstance(state, torch.Tensor))]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True)
    )


def _reasons(plan: Any) -> tuple[str, ...]:
    """Why sites were left alone, each reason once, without the parts that name a site or a number."""
    found = [site.reason for site in plan.norms if site.action == "leave"]
    found += [f"{pair.kind}: {pair.reason}" for pair in plan.pairs if pair.action == "leave"]
    found += [f"q and k: {site.reason}" for site in plan.query_key if site.action == "leave"]
    return tuple(dict.fromkeys(found))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines)[:110]}"


def totals(rows: Iterable[Row]) -> dict[str, int]:
    """What the tests pin."""
    rows = list(rows)
    return {
        "types": len(rows),
        "built": sum(not row.unbuilt for row in rows),
        "with RMSNorm": sum(row.has_norms for row in rows),
        "norms fused": sum(row.fused("norm") > 0 for row in rows),
        **{kind: sum(row.fused(kind) > 0 for row in rows) for kind in PAIR_KINDS},
        "norm_add left": sum(row.left("norm_add") > 0 for row in rows),
        "query_key": sum(row.fused("query_key") > 0 for row in rows),
        "rotation": sum(row.fused("rotation") > 0 for row in rows),
    }


def page(rows: list[Row]) -> str:
    counted = totals(rows)
    lines = [
        "# Support matrix",
        "",
        f"Generated by `scripts/support_matrix.py` with transformers {transformers.__version__}; "
        "a test fails when it is stale.",
        "",
        "Every causal-LM type that transformers can build from a small configuration (three layers where the type lets "
        "one choose) was run, patched with the reference backend, run again and reverted. Columns count sites of the "
        "plan. Same bits: logits and hidden states of all three runs are equal, bit for bit.",
        "",
        "| types | which |",
        "|--:|---|",
        *(f"| {counted[kind]} | {which} |" for kind, which in COUNTED.items()),
        "",
        "| type | norms fused | left | in-layer | left | cross-layer | final | norm then add | left | q with k | left "
        "| rotated | same bits | left because |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        if row.has_norms:
            lines.append(
                f"| {row.model_type} | {row.fused('norm')} | {row.left('norm')} | {row.fused('in_layer')} "
                f"| {row.left('in_layer')} | {row.fused('cross_layer')} | {row.fused('final')} "
                f"| {row.fused('norm_add')} | {row.left('norm_add')} | {row.fused('query_key')} "
                f"| {row.left('query_key')} | {row.fused('rotation')} | {'yes' if row.identical else 'NO'} "
                f"| {'; '.join(r.replace('|', '/') for r in row.reasons)} |"
            )
    none = [row.model_type for row in rows if not row.unbuilt and not row.has_norms]
    lines += ["", "## Without an RMSNorm", "", ", ".join(none), "", "## Not built from a small configuration", ""]
    lines += [f"- {row.model_type}: {row.unbuilt}" for row in rows if row.unbuilt]
    return wrapped("\n".join(lines) + "\n")


def survey_all(model_types: Iterable[str] = MODEL_TYPES) -> list[Row]:
    transformers.logging.set_verbosity(100)  # warnings about token ids outside the small vocabulary
    return [survey(model_type) for model_type in model_types]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("types", nargs="*", help="model types; all where none is named")
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    options = parser.parse_args(arguments)
    if options.types:
        for row in survey_all(options.types):
            print(row)
        return 0
    text = page(survey_all())
    if options.check:
        stale = not PAGE.is_file() or PAGE.read_text() != text
        print(f"{PAGE.name} is {'stale: run scripts/support_matrix.py' if stale else 'up to date'}")
        return int(stale)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
