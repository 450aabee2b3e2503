"""Train the two byte-level checkpoints that ship in `integration_tests/data`.

    python scripts/train_tiny.py                      # both, about ten minutes each on two cores
    python scripts/train_tiny.py --only tiny-llama --steps 50 --out /some/folder

The text is what a Python installation carries: the language reference in `pydoc_data.topics`, the docstrings of the
standard library's modules (read with `ast`, nothing is imported) and the licence file. Its digest and the Python
version go into `training.json`: another Python release has other text and so gives other weights. With the same text,
torch release and thread count the run repeats; across machines it repeats to rounding.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
from rich.progress import BarColumn, Progress, TextColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama import LlamaForCausalLM
from transformers.models.mistral import MistralForCausalLM

DATA = Path(__file__).resolve().parent.parent / "integration_tests" / "data"
BOS, EOS, VOCABULARY = 256, 257, 258
SEQUENCE, BATCH = 256, 16
HELD_OUT_EVERY = 20
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__"}

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


def build(name: str) -> PreTrainedModel:
    """A freshly initialised fp32 model; under 2 M parameters, so that bf16 weights stay below 4 MB."""
    if name == "tiny-llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5))
    if name == "tiny-mistral":
        config = MistralConfig(
            **SHAPE, num_attention_heads=6, num_key_value_heads=2, head_dim=32, sliding_window=None, rms_norm_eps=1e-6
        )
        return MistralForCausalLM(config)
    raise SystemExit(f"unknown checkpoint {name!r}; known: {', '.join(NAMES)}")


NAMES = ("tiny-llama", "tiny-mistral")


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 40:
                yield text


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) in a fixed order: topics by name, modules by path, the licence."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or relative.parts[0] == "pydoc_data":
            continue
        try:
            text = "\n\n".join(docstrings(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text:
            yield relative.as_posix(), text
    licence = library / "LICENSE.txt"
    if licence.is_file():
        yield "LICENSE.txt", licence.read_text(encoding="utf-8")


def corpus() -> tuple[bytes, bytes, str]:
    """(training bytes, held-out bytes, sha256 of both); every 20th document is held out."""
    training, held_out = [], []
    for index, (_, text) in enumerate(documents()):
        (held_out if index % HELD_OUT_EVERY == 7 else training).append(text.strip().encode("utf-8"))
    train, test = b"\n\n\n".join(training), b"\n\n\n".join(held_out)
    return train, test, hashlib.sha256(train + b"\0" + test).hexdigest()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value; 256 and 257 begin and end a text. It needs no merges, so nothing is trained."""
    # The byte-level alphabet shows every byte as one printable character: printable Latin-1 stands for itself, the
    # rest is moved to U+0100 and up, in order.
    shown = {b for b in range(256) if 33 <= b <= 126 or (161 <= b <= 255 and b != 173)}
    moved = iter(range(256, 512))
    vocabulary = {chr(b) if b in shown else chr(next(moved)): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|eos|>",
        clean_up_tokenization_spaces=False,
        model_max_length=SHAPE["max_position_embeddings"],
    )


Stepping = list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]


def optimisers(model: nn.Module, steps: int) -> Stepping:
    """Muon on the layers' matrices, which learns most from a short run; AdamW on embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    warmup, cooldown = max(1, steps // 20), max(1, int(steps * 0.6))

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 1.0, max((steps - step) / cooldown, 0.01))

    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        # No decay on the norms: their weights leave 1, so that a kernel which forgets them is caught.
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    return [(o, torch.optim.lr_scheduler.LambdaLR(o, schedule)) for o in made]


def train(model: PreTrainedModel, text: torch.Tensor, steps: int, seed: int, progress: Progress) -> float:
    """Train in place; returns the mean loss in bits per byte over the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    stepping = optimisers(model, steps)
    bar = progress.add_task("training", total=steps, loss=float("nan"))
    last: list[float] = []
    for step in range(steps):
        starts = torch.randint(0, text.numel() - SEQUENCE, (BATCH,), generator=generator)
        batch = torch.stack([text[i : i + SEQUENCE] for i in starts.tolist()])
        batch[::4, 0] = BOS  # some windows start a text, so that generation can too
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in stepping:
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
        bits = loss.item() / math.log(2)
        if step >= steps * 0.9:
            last.append(bits)
        progress.update(bar, advance=1, loss=bits)
        if step % 100 == 0:
            print(f"step {step}: {bits:.3f} bits/byte", flush=True)
    return sum(last) / len(last)


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, text: torch.Tensor, windows: int = 256) -> float:
    """Mean next-byte cross-entropy in bits over the first `windows` windows of 256 bytes."""
    count = min(windows, text.numel() // SEQUENCE)
    total = 0.0
    for chunk in text[: count * SEQUENCE].view(count, SEQUENCE).split(BATCH):
        total += model(input_ids=chunk, labels=chunk, use_cache=False).loss.item() * len(chunk)
    return total / count / math.log(2)


def save(model: PreTrainedModel, name: str, out: Path, record: dict[str, object], sample_prompt: str) -> None:
    folder = out / name
    tokenizer = byte_tokenizer()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS, do_sample=False, max_new_tokens=64
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompt = tokenizer(sample_prompt, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=160, do_sample=False)[0]
    record["sample"] = tokenizer.decode(tokens)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NAMES, help="train one of the two")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    training, held_out, digest = corpus()
    train_tokens, test_tokens = (torch.tensor(list(text), dtype=torch.long) for text in (training, held_out))
    for name in (args.only,) if args.only else NAMES:
        torch.manual_seed(args.seed)
        model = build(name)
        columns = (TextColumn(name), BarColumn(), TextColumn("{task.fields[loss]:.3f} bits/byte"))
        with Progress(*columns) as progress:
            training_bits = train(model, train_tokens, args.steps, args.seed, progress)
        model = model.to(torch.bfloat16).eval()
        record: dict[str, object] = {
            "text": "pydoc_data.topics, docstrings of the standard library, LICENSE.txt",
            "text_sha256": digest,
            "training_bytes": len(training),
            "held_out_bytes": len(held_out),
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": args.steps,
            "bytes_per_step": BATCH * SEQUENCE,
            "seed": args.seed,
            "training_bits_per_byte": round(training_bits, 3),
            "held_out_bits_per_byte_bf16": round(bits_per_byte(model, test_tokens), 3),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        save(model, name, args.out, record, "The statement ")


if __name__ == "__main__":
    main()
