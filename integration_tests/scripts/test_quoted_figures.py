"""Figures that README and the pages on vLLM quote are those of the record that they name, as it rounds."""

from __future__ import annotations

import json
import re

import pytest

from rmsnorm_patch.bench import rows

STEPS = ("decode-1", "decode-8", "decode-32", "decode-256")
PEERS = 7
"""In README's words; FlashInfer has two kernels and counts once."""


@pytest.fixture(scope="module")
def record(repository):
    """The one that is not superseded."""
    (path,) = (repository / "records").glob("*.json")
    return json.loads(path.read_text())


def table(page: str, head: str) -> dict[str, list[str]]:
    """Cells by the first of their line, of the table whose first line begins with `head`."""
    lines = page[page.index(f"\n| {head}") + 1 :].partition("\n\n")[0].splitlines()[2:]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in split}


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+\.\d+", text)


def engine(record, shape: str, variant: str, case: str) -> dict:
    (row,) = [r for r in record["vllm"] if (r["shape"], r["variant"], r["case"]) == (shape, variant, case)]
    return row


def longer(record, shape: str, variant: str, case: str) -> float:
    """% that a step takes longer than stock's; of prefill the tokens/s more."""
    mine, stock = (engine(record, shape, name, case) for name in (variant, "stock"))
    key = "tokens_per_s" if case == "prefill" else "step_us"
    return (mine[key] / stock[key] - 1) * 100


def ratios(record, model: str, work: str, *names: str) -> list[str]:
    (row,) = [r for r in record["hf"] if (r["model"], r["mode"], r["work"]) == (model, "eager", work)]
    return [f"{row['ratio_to_stock'][name]:.2f}" for name in names]


def readme_figures(record, aims) -> dict[str, list[str]]:
    """Row of README's table -> its figures, in the order of its words."""

    def shorter(shape: str, variant: str, cases: tuple[str, ...]) -> list[str]:
        return [f"{-longer(record, shape, variant, case):.1f}" for case in cases]

    def mean(chosen: list[dict]) -> str:
        return f"{rows.geometric_mean(map(rows.gain, chosen)):.2f}"

    llama = [ratios(record, "llama-8b", work, "patched", "F.rms_norm") for work in ("decode 1", "decode 32")]
    qwen = [*ratios(record, "qwen3-8b", "decode 1", "patched"), *ratios(record, "qwen3-8b", "decode 8", "patched")]
    prefill = ratios(record, "llama-8b", "prefill 4x2048", "patched", "F.rms_norm", "liger")
    chain = [rows.gain(row) for row in aims.chain(record, 1, 256)]
    return {
        "Hugging Face, decode": [llama[0][0], llama[1][0], llama[0][1], llama[1][1]],
        "the same, Qwen3-8B": qwen,
        "Hugging Face, prefill": [*prefill, *ratios(record, "qwen3-8b", "prefill 4x2048", "patched")],
        "vLLM, Llama-8B shapes": shorter("llama-8b", "ir", STEPS),
        "the same, FP8 in blocks": shorter("llama-8b-block", "ir", STEPS),
        "vLLM, Llama-1B shapes": shorter("llama-1b", "ir", STEPS[:3]),
        "the kernel, 4096 rows": [mean(aims.prefill(record)), mean(aims.plain(record))],
        "the kernel, 1 to 256 rows": [f"{min(chain):.2f}", f"{max(chain):.2f}"],
    }


def test_figures_in_readme_are_those_of_the_record(script, repository, record):
    aims = script("benchlib.aims")
    shown = table((repository / "README.md").read_text(), "work | state")
    expected = readme_figures(record, aims)
    assert shown.keys() == expected.keys()
    for work, (state, figures, _) in shown.items():
        assert numbers(figures) == expected[work], work
        ahead = re.fullmatch(r"ahead at (\d+) of (\d+) lengths", state)
        if ahead:
            gains = [rows.gain(row) for row in aims.prefill(record)]
            assert [int(n) for n in ahead.groups()] == [sum(gain >= 1 for gain in gains), len(gains)]
    assert abs(longer(record, "llama-1b", "ir", "decode-256")) < 0.5  # "as long at 256"
    assert len(rows.PEERS) - 1 == PEERS
    assert "seven peers" in shown["the kernel, 4096 rows"][1]


def test_readme_names_the_record_and_its_stack(repository, record):
    readme = " ".join((repository / "README.md").read_text().split())
    (path,) = (repository / "records").glob("*.json")
    versions = {name: ".".join(record["versions"][name].split(".")[:2]) for name in ("torch", "vllm")}
    assert f"torch {versions['torch']}, vLLM {versions['vllm']}, `records/{path.name}`" in readme


VLLM = {
    "Llama-8B shapes, route `ir`": ("llama-8b", "ir"),
    "the same, route `oot` with the IR hidden": ("llama-8b", "oot-noir"),
    "Llama-1B shapes, route `ir`": ("llama-1b", "ir"),
}


def test_figures_of_engines_are_those_of_the_record(repository, record):
    shown = table((repository / "docs" / "vllm.md").read_text(), "engine, bf16")
    assert shown.keys() == VLLM.keys()
    for name, (shape, variant) in VLLM.items():
        found = [longer(record, shape, variant, case) for case in (*STEPS, "prefill")]
        assert shown[name] == [f"{value:+.1f} %" for value in found], name


def test_figures_of_quantised_engines_are_those_of_the_record(repository, record):
    shown = table((repository / "docs" / "vllm_quantised.md").read_text(), "engine | its step over stock's")
    shape = ""
    for name, (steps, prefill, variant) in shown.items():
        shape = {"FP8 per token": "llama-8b-token", "FP8 blocks": "llama-8b-block"}.get(name.split(",")[0], shape)
        variant = variant.strip("`")
        if variant == "stock":
            assert numbers(steps) == [f"{engine(record, shape, 'stock', case)['step_us']:.1f}" for case in STEPS]
            continue
        found = [longer(record, shape, variant, case) for case in STEPS]
        assert steps == " / ".join(f"{value:+.1f}" for value in found) + " %", name
        assert prefill == f"{longer(record, shape, variant, 'prefill'):+.1f} %", name
