"""How many tokens and logprobs of a vLLM engine are those of transformers, with the engine's numerics in the norms and
with transformers' (RMSNORM_PATCH_VLLM_NUMERICS).

    python scripts/compare_logprobs.py CHECKPOINT ... --tokens 64 --json out.json     # in vLLM's environment

Each engine is a process of its own, bf16 and eager, and decodes greedily behind prompts of fixed token ids.
transformers' forward then runs on what each engine decoded. The table of the first lines goes into
docs/decisions/vllm.md.

A row of the JSON: {"model": name of the folder, "numerics", "tokens": compared, "greedy_equal", "logprobs_equal": of
them, "largest_difference": of two logprobs, "norms": what the worker said of the numerics}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NUMERICS = ("engine", "huggingface")
PROMPTS = [[5, 70, 101, 108, 111], [40, 98, 105, 32, 97, 32, 110]]
"""Token ids that every vocabulary has."""


def decode(model: Path, tokens: int) -> dict[str, Any]:
    """Child: an engine's tokens, and the logprob of each, by prompt."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        enforce_eager=True,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=tokens + 16,
        max_num_seqs=4,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=True,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False)
    done = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    found = [output.outputs[0] for output in done]
    return {
        "tokens": [list(each.token_ids) for each in found],
        "logprobs": [[step[t].logprob for t, step in zip(each.token_ids, each.logprobs)] for each in found],  # noqa: B905
    }


def engine(model: Path, numerics: str, tokens: int) -> tuple[dict[str, Any], list[str]]:
    """What a child decoded, and what its worker said of the norms' numerics; SystemExit with its log's end."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        environment = {
            "RMSNORM_PATCH_VLLM": "ir",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **os.environ,
            "RMSNORM_PATCH_VLLM_NUMERICS": numerics,
        }
        command = [sys.executable, __file__, str(model), "--tokens", str(tokens), "--decode", str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode:
            raise SystemExit(f"compare_logprobs: the engine of {model} with {numerics} ended; its log:\n{log[-3000:]}")
        said = re.findall(r"rmsnorm_patch: worker \d+: (.*(?:norms compute|numerics).*)", log)
        return json.loads(answer.read_text()), said


def compare(model: Any, decoded: dict[str, Any]) -> dict[str, Any]:
    """Of all decoded tokens: how many transformers would choose, and give the very same logprob."""
    import torch

    greedy = equal = count = 0
    largest = 0.0
    for prompt, tokens, logprobs in zip(PROMPTS, decoded["tokens"], decoded["logprobs"], strict=True):
        ids = torch.tensor([prompt + tokens], device=model.device)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu()
        chosen = torch.tensor(tokens)
        want = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        got = torch.tensor(logprobs)
        count += len(tokens)
        greedy += int((logits.argmax(-1) == chosen).sum())
        equal += int((got == want).sum())
        largest = max(largest, float((got - want).abs().max()))
    return {"tokens": count, "greedy_equal": greedy, "logprobs_equal": equal, "largest_difference": round(largest, 6)}


def rows_of(folder: Path, tokens: int) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    engines = {numerics: engine(folder, numerics, tokens) for numerics in NUMERICS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    return [
        {"model": folder.name, "numerics": numerics, **compare(model, decoded), "norms": said}
        for numerics, (decoded, said) in engines.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | numerics | tokens | greedy equal | logprobs equal | largest difference |",
        "|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['model']} | {row['numerics']} | {row['tokens']} | {row['greedy_equal'] / row['tokens']:.1%} | "
        f"{row['logprobs_equal'] / row['tokens']:.1%} | {row['largest_difference']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of checkpoints")
    parser.add_argument("--tokens", type=int, default=64, help="decoded behind each prompt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        options.decode.write_text(json.dumps(decode(options.models[0], options.tokens)))
        return
    rows = [row for folder in options.models for row in rows_of(folder, options.tokens)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
