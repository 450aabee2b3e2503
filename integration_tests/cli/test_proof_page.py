"""`verify --html`: one file that stands alone, says what the proof says, and reads well in a browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import rmsnorm_patch
from rmsnorm_patch.cli.output import FAILED, USAGE
from rmsnorm_patch.cli.proof_page import page_of, write_page
from rmsnorm_patch.errors import VerificationFailed
from rmsnorm_patch.proof.report import Proof
from rmsnorm_patch.scan.plan import Plan

VOID = {"meta", "link", "br", "wbr", "hr", "img", "rect", "circle", "path", "line"}


LINES_OF_NAMES = """[...new Set([...document.querySelectorAll(".sites .path")].flatMap(path =>
  [...path.childNodes].filter(node => node.nodeType === Node.TEXT_NODE).map(node => {
    const range = document.createRange(); range.selectNodeContents(node); return range.getClientRects().length; })))]"""
"""The lines that the names in the paths of sites take, each number once: a path breaks behind a dot."""


WIDER_THAN_THE_SCREEN = """[...document.querySelectorAll(".scroll")].filter(part =>
  part.scrollWidth > part.clientWidth + 1).map(part => part.scrollWidth)"""
"""Tables of comparisons whose last column, the verdict, is out of sight."""


class Outline(HTMLParser):
    """ids, links, classes and text of a page; every element is closed by its own tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.classes: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.references += [named[name] or "" for name in ("href", "src") if name in named]
        self.classes += (named.get("class") or "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def proved(small_proof_model) -> tuple[Proof, Plan]:
    """A proof of a small Qwen 3 with one norm left out and layers enough that paths differ."""
    model = small_proof_model
    report = rmsnorm_patch.apply(model, exclude=["*.1.input_layernorm"])
    return rmsnorm_patch.verify(model, {"input_ids": torch.arange(3, 15)[None]}, greedy_tokens=2), report.plan


@pytest.fixture(scope="module")
def small_proof_model() -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, num_hidden_layers=3, head_dim=16, vocab_size=320)
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def red(proved: tuple[Proof, Plan]) -> Proof:
    """The same with one site outside tolerance, one at 43 % of it, and one that was not judged."""
    proof, _ = proved
    sites = list(proof.sites)
    wrong = replace(sites[0].measurements[0], violations=("17 ulp, <b>1</b> allowed",), max_ulp=17, severity=17.0)
    near = replace(sites[1].measurements[0], severity=0.43)
    sites[0] = replace(sites[0], measurements=(wrong,))
    sites[1] = replace(sites[1], measurements=(near,))
    sites[2] = replace(sites[2], measurements=())
    return replace(proof, sites=tuple(sites))


def test_the_page_stands_alone_and_says_what_the_proof_says(proved: tuple[Proof, Plan]) -> None:
    proof, plan = proved
    text = page_of(proof, plan)
    found = Outline(text)
    assert not re.search(r"https?:|<script|@import|url\(", text)
    assert all(reference.startswith(("#", "data:")) for reference in found.references)
    targets = {reference[1:] for reference in found.references if reference.startswith("#")}
    assert targets == set(found.ids)  # each norm of the picture leads to its row
    assert len(found.ids) == len(set(found.ids)) == len(plan.norms) == 13
    words = " ".join(found.text.split())
    for said in ("proved", "12 of 13", "5 of 6", "2 equal", "left alone", "excluded by", proof.command()):
        assert said in words
    for site in plan.norms:
        assert site.path in words
    assert found.classes.count("add") == 6 + 2  # and two in the legend
    assert found.classes.count("join") == 5 + 1
    assert found.classes.count("state-ok") == 12
    assert found.classes.count("state-left") == 1


def test_each_verdict_has_its_mark(proved: tuple[Proof, Plan], red: Proof) -> None:
    text = page_of(red, proved[1])
    found = Outline(text)
    assert "failed" in found.text
    counted = [found.classes.count(f"state-{state}") for state in ("red", "ok", "unjudged", "left")]
    assert counted == [1, 10, 1, 1]
    assert "over 999 %" in found.text
    assert "43 %" in found.text
    assert "17 ulp, <b>1</b> allowed" in found.text  # what the model's own words say is text, never markup


def test_the_command_writes_it(command, tiny_llama: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "proof.html"
    ended = command("verify", tiny_llama, "--html", page, "--max-new-tokens", 2, "--json")
    assert ended.status == 0
    assert ended.document["passed"]
    assert "9 of 9" in page.read_text()
    assert [path.name for path in page.parent.iterdir()] == ["proof.html"]


def test_a_red_proof_is_written_too(
    command, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, red: Proof
) -> None:
    from rmsnorm_patch import api

    def fails(*_: Any, **__: Any) -> None:
        raise VerificationFailed("a site", "17 ulp", "1 ulp", "look at it", proof=red)

    monkeypatch.setattr(api, "verify", fails)
    page = tmp_path / "proof.html"
    assert command("verify", tiny_llama, "--html", page).status == FAILED
    assert ">failed<" in page.read_text()


def test_a_place_that_cannot_be_written_is_known_before(command, tiny_llama: Path, tmp_path: Path) -> None:
    ended = command("verify", tiny_llama, "--html", tmp_path)
    assert ended.status == USAGE
    assert "--html" in ended.stderr
    same = tmp_path / "both"
    assert command("verify", tiny_llama, "--html", same, "--record", same).status == USAGE


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs a chromium on the PATH")
    with sync_api.sync_playwright() as player:
        opened = player.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_reads_well_in_a_browser(
    browser: Any, proved: tuple[Proof, Plan], red: Proof, tmp_path: Path, width: int, scheme: str
) -> None:
    """No error, no request for another file, no overflow, text that stands out from its ground in both schemes."""
    path = tmp_path / "proof.html"
    write_page(path, red, proved[1])
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(LINES_OF_NAMES) == [1]
    assert page.evaluate(WIDER_THAN_THE_SCREEN) == []
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((sum, n) => sum + Number(n), 0))"
    )
    assert (colours[0] > colours[1] + 400) if scheme == "dark" else (colours[1] > colours[0] + 400)
    assert page.locator("figure svg a").count() == 13
    page.locator("figure svg a").first.click()
    assert page.evaluate("location.hash") == "#site-1"
    page.close()
