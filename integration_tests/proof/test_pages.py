"""print(plan), print(report) and print(proof) read as a page; explain() leaves nothing out."""

from __future__ import annotations

import re

import pytest
import torch

from rmsnorm_patch import apply, page, plan
from rmsnorm_patch.cli.tables import plan_table
from rmsnorm_patch.scan.plan import NormSite, Plan

LAYERS = 24


def is_a_page(text: str, lines: int) -> None:
    shown = text.splitlines()
    assert 3 <= len(shown) <= lines
    assert max(map(len, shown)) <= 120
    assert "NormSite(" not in text


def test_a_deep_model_prints_as_a_page(small_model) -> None:
    """Layers that are treated alike are one line with their number; what is left says why."""
    model = small_model("qwen3", num_hidden_layers=LAYERS)
    found = plan(model, exclude=["model.layers.3.input_layernorm"])
    text = str(found)
    is_a_page(text, 25)
    where = rf"model\.layers\.\[0-{LAYERS - 1}\]\.post_attention_layernorm"
    assert re.search(rf"fuse +{LAYERS} x {where}: Qwen3RMSNorm", text)
    assert "model.layers.3.input_layernorm" in text
    assert f"{4 * LAYERS} of {4 * LAYERS + 1} norms fused" in text
    whole = found.explain()
    assert all(site.reason in " ".join(whole.split()) for site in found.norms if site.action == "leave")
    assert all(re.search(rf"{re.escape(site.path)}(?![\w.])", whole) for site in found.norms)
    assert all(re.search(rf"{re.escape(pair.norm)}(?![\w.])", whole) for pair in found.pairs)


def test_report_and_proof_print_as_pages(small_model) -> None:
    model = small_model("qwen3", num_hidden_layers=LAYERS)
    report = apply(model, verify=torch.arange(3, 40)[None], greedy_tokens=2)
    is_a_page(str(report), 35)
    is_a_page(str(report.proof), 15)
    assert str(report.proof) in str(report)
    assert "proved" in str(report)
    assert f"{4 * LAYERS + 1} norms and {LAYERS} layers" in str(report)
    whole = report.explain()
    assert report.proof.explain() in whole
    assert all(f"\n  {path}\n" in whole for path in (*report.norms, *report.layers))


def test_many_fallbacks_are_counted(small_model) -> None:
    """A proof with a line for each layer prints the first of them and a number; explain() has them all."""
    model = small_model("llama", num_hidden_layers=LAYERS)
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: None)
    proof = apply(model, verify=torch.arange(3, 9)[None], greedy_tokens=0).proof
    assert len(proof.fired.fallbacks) >= LAYERS - 1
    is_a_page(str(proof), 20)
    assert re.search(r"fell back: .*\(and \d+ more like this\)", " ".join(str(proof).split()))
    assert all(f"fell back: {text}" in proof.explain() for text in proof.fired.fallbacks)


def odd_plan() -> Plan:
    """Kinds without end, long names, long reasons."""
    long = "model." + "a_very_long_name_of_a_module." * 6 + "norm"
    reason = "it has " + "a reason of many words, " * 20
    names = [f"part_{'x' * i}.norm" for i in range(60)]
    norms = [NormSite(name, "Norm", None, "leave", reason) for name in names]
    return Plan("Odd", "auto", (NormSite(long, "Norm", None, "leave", reason), *norms), (), notes=("a note",) * 30)


def test_lists_without_end_are_cut_and_counted() -> None:
    text = str(odd_plan())
    is_a_page(text, 300)
    assert "... and 21 more kinds, see explain()" in text
    assert "... and 20 more notes, see explain()" in text
    assert odd_plan().explain().count("note: a note") == 30


@pytest.mark.parametrize("width", [60, 80, 100])
def test_words_stay_whole(small_model, width: int) -> None:
    """At 80 columns too: every path, class and word of a reason that fits a line stands in one piece."""
    from io import StringIO

    from rich.console import Console

    for found in (plan(small_model("gemma3_text", num_hidden_layers=3)), odd_plan()):
        out = StringIO()
        Console(file=out, width=width).print(plan_table(found, width))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        words = {word for line in lines for word in line.split()}
        for group in (*found.norm_groups(), *found.pair_groups()):
            wanted = f"{group.where} {group.what}: {group.why}".split()
            assert {word for word in wanted if len(word) < width - 25} <= words


def test_words_too_long_for_a_line_part_at_a_dot() -> None:
    lines = page.wrapped("see model.layers.0.self_attn.query_norm", 20, "  ")
    assert lines == ["see model.layers.0.", "  self_attn.", "  query_norm"]
    assert "".join(page.wrapped("x" * 50, 20)).replace(" ", "") == "x" * 50
