"""Tokens per second of a Hugging Face model, stock against patched and the other ways to speed up its norms.

    python scripts/bench_hf.py --shape llama-8b --json out.json
    python scripts/bench_hf.py --shape llama-8b --layers 8 --compile --variants stock F.rms_norm patched
    python scripts/bench_hf.py --shape llama-8b --compile reduce-overhead --variants stock joined --prefill
    python scripts/bench_hf.py --shape gemma2-9b --variants stock patched "patched-apart" --batch 1
    python scripts/bench_hf.py --shape qwen3-8b --variants stock patched-unrotated patched --rounds 7

Variants share one set of weights and run in alternating rounds (forwards, then backwards), so that clocks and host
noise hit all of them. Each is checked against stock logits before it is timed; "removed" (no norm at all) is a ceiling
and has no right answer; "patched-apart" leaves adds behind norms to themselves, "patched-unrotated" the rotation of
queries and keys; "joined" is patched with compiled="joined". "F.rms_norm" has aten's kernel, "F.rms_norm-quack" what
torch puts in its place. --compile is torch.compile, with its default settings or "reduce-overhead" (CUDA graphs),
decoding into a static cache; --ops puts our ops into the graphs (RMSNORM_PATCH_COMPILE=op). --captured repeats one
eager step of one token, captured in a CUDA graph, without a cache. --prefill without numbers leaves prefill out;
compiled variants are then checked on the graph that decodes.

A row of the JSON: {"model", "layers", "work": "decode BATCH" | "prefill BATCHxLENGTH", "mode": "eager" | "captured" |
"compiled" ["reduce-overhead"] ["with ops"],
"tokens_per_s": {variant: median of the rounds}, "spread": {variant: [least, most]}, "ratio_to_stock": {variant: ratio
of medians}, "logit_error": {variant: relative distance from stock logits}, "missing": {variant: why it is not here},
"norm_kernels": {variant: the kernels of one `F.rms_norm`}}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchlib import models

PROMPT, WARM = 128, 4
MAX_LOGIT_ERROR = 0.06
"""Relative Frobenius distance from stock logits; bf16 models of 32 random layers that differ in rounding alone measure
about 0.01 to 0.03, a wrong eps or weight gives 1."""


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def static_cache(model, tokens: int):
    """For the prompt and a round of decoded tokens."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=PROMPT + tokens + WARM + 1)


@torch.inference_mode(False)
@torch.no_grad()
def decode(model, batch: int, tokens: int, static: bool) -> float:
    """Tokens per second of greedy decoding after a short prompt, prefill not counted."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=device)
    cache = static_cache(model, tokens) if static else DynamicCache(config=model.config)
    forward = model._bench_forward if static else model
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    start = 0.0
    for step in range(tokens + WARM):
        torch.compiler.cudagraph_mark_step_begin()
        if step == WARM:
            sync()
            start = time.perf_counter()
        out = forward(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    sync()
    return batch * tokens / (time.perf_counter() - start)


@torch.no_grad()
def captured_step(model, batch: int, tokens: int) -> float:
    """Tokens per second of replays of an eager step of one token a sequence, captured in a CUDA graph, without a cache:
    the host's cost is none, and attention costs nothing. Without a GPU the step itself is repeated."""
    device = next(model.parameters()).device
    token = torch.ones(batch, 1, dtype=torch.long, device=device)

    def step():
        token.copy_(model(token, use_cache=False).logits[:, -1:].argmax(-1))

    for _ in range(2):
        step()
    sync()
    repeat = step
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        repeat = graph.replay
        repeat()
    sync()
    start = time.perf_counter()
    for _ in range(tokens):
        repeat()
    sync()
    return batch * tokens / (time.perf_counter() - start)


@torch.no_grad()
def prefill(model, batch: int, length: int, repeats: int, compiled: bool) -> float:
    """Prompt tokens per second without a cache; only the last position's logits."""
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
    forward = model._bench_forward if compiled else model
    forward(input_ids=ids, use_cache=False, logits_to_keep=1)
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.compiler.cudagraph_mark_step_begin()
        forward(input_ids=ids, use_cache=False, logits_to_keep=1)
    sync()
    return batch * length * repeats / (time.perf_counter() - start)


@torch.no_grad()
def check(variants: dict, compiled: bool = False) -> dict[str, float]:
    """Relative distance of each variant's logits from eager stock's; over the limit ends the run."""
    device = next(variants["stock"].parameters()).device
    ids = torch.randint(0, variants["stock"].config.vocab_size, (2, 64), device=device)
    want = variants["stock"](ids, use_cache=False).logits.float()
    errors = {}
    for name, model in variants.items():
        if name == "removed":
            continue
        forward = model._bench_forward if compiled else model
        with models.kernels_of(name):
            got = forward(input_ids=ids, use_cache=False).logits.float()
        errors[name] = ((got - want).norm() / want.norm()).item()
        if not errors[name] <= MAX_LOGIT_ERROR:
            raise SystemExit(
                f"bench_hf: {name} differs from stock by {errors[name]:.3g} > {MAX_LOGIT_ERROR}; not timed"
            )
    return errors


@torch.no_grad()
def check_decode(variants: dict, batch: int, tokens: int) -> dict[str, float]:
    """As `check`, by one token after a prompt in a static cache, through the graph that is timed."""
    stock = variants["stock"]
    device = next(stock.parameters()).device
    ids = torch.randint(0, stock.config.vocab_size, (batch, PROMPT + 1), device=device)

    def logits(prompt, step) -> torch.Tensor:
        cache = static_cache(stock, tokens)
        prompt(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.compiler.cudagraph_mark_step_begin()
        return step(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits.float().clone()

    want = logits(stock, stock)
    errors = {}
    for name, model in variants.items():
        if name != "removed":
            with models.kernels_of(name):
                errors[name] = ((logits(stock, model._bench_forward) - want).norm() / want.norm()).item()
            if not errors[name] <= MAX_LOGIT_ERROR:
                raise SystemExit(f"bench_hf: {name} decodes {errors[name]:.3g} from stock; not timed")
    return errors


def workloads(args: argparse.Namespace) -> dict[str, Callable]:
    compiled = args.compile is not None
    if args.captured:
        return {f"decode {n}": lambda model, n=n: captured_step(model, n, args.tokens) for n in args.batch}
    found: dict[str, Callable] = {
        f"decode {batch}": lambda model, batch=batch: decode(model, batch, args.tokens, static=compiled)
        for batch in args.batch
    }
    if args.prefill:
        batch, length = args.prefill
        found[f"prefill {batch}x{length}"] = lambda model: prefill(model, batch, length, args.repeats, compiled)
    return found


def alternate(variants: dict, work: Callable, rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        names = list(variants) if turn % 2 == 0 else list(variants)[::-1]
        for name in names:
            with models.kernels_of(name):
                samples[name].append(work(variants[name]))
    return samples


def compile_all(variants: dict, mode: str) -> None:
    """All variants share one code object, so the default limit of 8 graphs would leave the ninth uncompiled."""
    torch._dynamo.config.recompile_limit = 64
    for model in variants.values():
        model._bench_forward = torch.compile(model.forward, dynamic=False, mode=mode)


def mode_of(args: argparse.Namespace) -> str:
    if not args.compile:
        return "captured" if args.captured else "eager"
    return " ".join(["compiled", *[args.compile] * (args.compile != "default"), *["with ops"] * args.ops])


def run(args: argparse.Namespace) -> list[dict]:
    stock = models.build(args.shape, args.device, args.layers)
    variants, missing = models.variants(stock, args.variants)
    for name, why in missing.items():
        print(f"{name} is not here: {why}", flush=True)
    errors = check(variants)
    kernels = {name: models.norm_kernels(name, args.device) for name in variants if name.startswith("F.")}
    if args.compile:
        compile_all(variants, args.compile)
        errors = check(variants, compiled=True) if args.prefill else check_decode(variants, args.batch[0], args.tokens)
    print("logits against stock: " + ", ".join(f"{k} {v:.2e}" for k, v in errors.items()), flush=True)
    rows = []
    for name, work in workloads(args).items():
        if args.compile:
            for variant, model in variants.items():
                with models.kernels_of(variant):
                    work(model)
        samples = alternate(variants, work, args.rounds)
        medians = {variant: statistics.median(values) for variant, values in samples.items()}
        rows.append(
            {
                "model": args.shape,
                "layers": variants["stock"].config.num_hidden_layers,
                "work": name,
                "mode": mode_of(args),
                "tokens_per_s": {variant: round(value, 2) for variant, value in medians.items()},
                "spread": {variant: [round(min(v), 2), round(max(v), 2)] for variant, v in samples.items()},
                "ratio_to_stock": {variant: round(value / medians["stock"], 4) for variant, value in medians.items()},
                "logit_error": errors,
                "missing": missing,
                "norm_kernels": kernels,
            }
        )
        cells = "  ".join(f"{v} {t:.0f} ({t / medians['stock']:.3f}x)" for v, t in medians.items())
        print(f"{rows[-1]['mode']} {name}: {cells}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(models.SHAPES), default="llama-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--variants", nargs="+", choices=list(models.VARIANTS), default=list(models.USUAL))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32], help="decode batch sizes")
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens per round")
    parser.add_argument("--prefill", type=int, nargs="*", default=[4, 2048], metavar=("BATCH", "LENGTH"))
    parser.add_argument("--repeats", type=int, default=3, help="prefill forwards per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead"),
        help="torch.compile every variant; static cache for decode",
    )
    parser.add_argument("--captured", action="store_true", help="replay a captured eager step; no prefill")
    parser.add_argument("--ops", action="store_true", help="our ops in the patched model's graphs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    if len(args.prefill) not in (0, 2) or not (args.prefill or args.batch):
        parser.error("--prefill takes BATCH and LENGTH, or nothing where --batch names what to decode")
    if "stock" not in args.variants:
        parser.error("--variants must hold stock: every ratio is against it")
    if args.captured and args.compile:
        parser.error("--captured: got --compile too; a captured step is an eager one; give one of them")
    if args.ops:
        os.environ["RMSNORM_PATCH_COMPILE"] = "op"
    run(args)


if __name__ == "__main__":
    main()
