"""Would a query's and a key's norm with their rotation in one launch be worth building? One figure, of eager decode.

    python scripts/trial_query_key.py --json trial.json

Five variants of one model of Qwen3-8B's shapes (bf16, random weights that all share): "stock"; "norms", patched, with
a launch each for q and k; "query_key", patched, with one for both; "rotated", the rotation in that launch too, by a
trial kernel started from Python; "removed", neither norm nor rotation, what nothing can be faster than.

Before anything is timed the trial kernel must give the bits of the model's `apply_rotary_pos_emb` on our norm, and
the patched variants one another's logits. Rounds alternate. The figure is the least, over the batches, of the median
over rounds of tokens per second, "rotated" over "norms"; the aim stands beside it. A row of the JSON: {"batch",
"rounds", "tokens_per_s": {variant: median}, "over_norms": {variant: median of the rounds' ratios}}.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from bench_hf import decode, sync
from benchlib.models import share_weights
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rmsnorm_patch  # noqa: E402
from rmsnorm_patch.backends.cuda import driver, jit, launcher, nvrtc  # noqa: E402
from rmsnorm_patch.backends.cuda.arguments import declared  # noqa: E402
from rmsnorm_patch.backends.cuda.schedules import schedules, sm  # noqa: E402
from rmsnorm_patch.numerics.spec import LLAMA  # noqa: E402
from rmsnorm_patch.patch_state import original_class, role_of  # noqa: E402

AIM = 1.08
SOURCE = Path(__file__).with_name("benchlib") / "query_key_rotated.cu"
ENTRY = "query_key_rotated"
SHAPES = {
    "qwen3-8b": dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
    ),
    "tiny": dict(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=512,
    ),
}  # fmt: skip
Two = tuple[torch.Tensor, torch.Tensor]
Rotate = Callable[..., Two]
"""(query [B, S, H, D], key [B, S, K, D], query norm, key norm, cos [b, S, D], sin) -> both, [B, heads, S, D]."""


def machine_code(arch: int, n: int) -> tuple[bytes, jit.Build, struct.Struct]:
    """The trial kernel for bf16 rows of `n` columns, what it was built with, and the layout of its arguments."""
    (config, *_) = schedules("rms_norm_pair", torch.bfloat16, n, arch)
    build = jit.Build(config, LLAMA, False, n, 1, torch.bfloat16, torch.bfloat16, 16, 16, False, arch)
    headers = jit.source_of(config.source).headers
    text = SOURCE.read_text()
    arguments = declared(SOURCE.name, text, headers)
    options = (f"--gpu-architecture={build.architecture()}", *build.options())
    code = nvrtc.compile_source(SOURCE.name, text + arguments.assertions(), headers, options)
    layout = struct.Struct("<QQQqqQQQqqQQqf4x")
    assert layout.size == arguments.size, "struct Args and the layout differ"
    return code, build, layout


class Rotated:
    """The trial kernel on the current device; called as `Rotate`."""

    def __init__(self, n: int) -> None:
        index, arch = torch.cuda.current_device(), sm(torch.cuda.get_device_capability())
        code, build, layout = machine_code(arch, n)
        config, functions = build.config, launcher.functions()
        self.n, self.rows, self.pack, self.start = n, config.rows_per_cta, layout.pack, functions.launch
        arguments = declared(SOURCE.name, SOURCE.read_text(), jit.source_of(config.source).headers)
        self.handle = functions.new_kernel(
            driver.load(code, ENTRY, index, SOURCE.name), driver.primary_context(index), n, 2**63 - 1,
            config.rows_per_cta, 1, config.threads, int(arch >= 90), 16, 16, 0, arguments,
        )  # fmt: skip
        self.index, self.stream = index, torch._C._cuda_getCurrentRawStream

    def __call__(self, query, key, query_norm, key_norm, cos, sin):
        rows, made, made_key = self.rows, torch.empty_like(query), torch.empty_like(key)
        heads, key_heads = query.shape[2], key.shape[2]
        m, m2 = query.numel() // self.n, key.numel() // self.n
        packed = self.pack(
            query.data_ptr(), query_norm._parameters["weight"].data_ptr(), made.data_ptr(), m, heads,
            key.data_ptr(), key_norm._parameters["weight"].data_ptr(), made_key.data_ptr(), m2, key_heads,
            cos.data_ptr(), sin.data_ptr(), cos.numel() // self.n, query_norm.variance_epsilon,
        )  # fmt: skip
        if self.start(self.handle, self.stream(self.index), -(-m // rows) + -(-m2 // rows), packed):
            raise RuntimeError("the trial kernel did not start")
        return made.transpose(1, 2), made_key.transpose(1, 2)


def model_own(query, key, query_norm, key_norm, cos, sin) -> Two:
    """The norms as they are and the model's own rotation."""
    rows = query_norm(query).transpose(1, 2), key_norm(key).transpose(1, 2)
    return modeling_qwen3.apply_rotary_pos_emb(*rows, cos, sin)


def nothing(query, key, query_norm, key_norm, cos, sin) -> Two:
    """No norm, no rotation."""
    return query.transpose(1, 2), key.transpose(1, 2)


def attention_with(rotate: Rotate) -> type[nn.Module]:
    """Qwen3's attention, its norms and rotation by `rotate`; all else is the model's own code."""

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape)
        key = self.k_proj(hidden_states).view(hidden_shape)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        modules = self._modules
        query_states, key_states = rotate(query, key, modules["q_norm"], modules["k_norm"], *position_embeddings)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)
        attend = modeling_qwen3.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_qwen3.eager_attention_forward
        )
        attn_output, attn_weights = attend(
            self, query_states, key_states, value_states, attention_mask,
            dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights

    own = modeling_qwen3.Qwen3Attention
    return type(own.__name__, (own,), {"forward": forward})


def variants(stock: nn.Module, rotate: Rotate) -> dict[str, nn.Module]:
    found = {"stock": stock}
    for name in ("norms", "query_key", "rotated", "removed"):
        model = found[name] = share_weights(stock)
        rmsnorm_patch.apply(model)
        other = {"rotated": attention_with(rotate), "removed": attention_with(nothing)}.get(name)
        for module in model.modules():
            if role_of(module) == "attention" and name != "query_key":
                module.__class__ = other or original_class(type(module))
    return found


def check_model() -> None:
    """Ends the run where the model is not the one whose attention stands here."""
    if "cache" not in inspect.signature(modeling_qwen3.Qwen3Attention.forward).parameters:
        raise SystemExit("trial: attention_with has the attention of transformers 5.24; install that version")


def build(shape: str, device: str, layers: int | None) -> nn.Module:
    config = Qwen3Config(**SHAPES[shape], tie_word_embeddings=False)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def check_rotation(rotate: Rotate, model: nn.Module) -> int:
    """Ends the run where `rotate` gives other bits than our norm and the model's rotation. model: "norms"."""
    attention, config = model.model.layers[0].self_attn, model.config
    device, elements = attention.q_norm.weight.device, 0
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.copy_(torch.rand(config.head_dim, device=device) + 0.5)
    for batch, length in ((1, 1), (8, 1), (1, 7), (2, 130)):
        shape = (batch, length, -1, config.head_dim)
        query = torch.randn(batch, length, config.num_attention_heads * config.head_dim, device=device).bfloat16()
        key = torch.randn(batch, length, config.num_key_value_heads * config.head_dim, device=device).bfloat16()
        positions = torch.arange(100, 100 + length, device=device)[None]
        operands = (query.view(shape), key.view(shape), attention.q_norm, attention.k_norm)
        angles = model.model.rotary_emb(query, positions)
        if not all(angle.is_contiguous() for angle in angles):
            raise SystemExit("trial: the kernel takes contiguous cos and sin")
        for got, want in zip(rotate(*operands, *angles), model_own(*operands, *angles), strict=True):
            wrong, elements = int((got != want).sum()), elements + want.numel()
            if wrong:
                raise SystemExit(f"trial: {wrong} of {want.numel()} elements differ at batch {batch}, length {length}")
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(1.0)
    return elements


@torch.no_grad()
def check_logits(models: dict[str, nn.Module]) -> None:
    device = next(models["stock"].parameters()).device
    ids = torch.arange(48, device=device).view(2, 24)
    logits = {name: models[name](ids, use_cache=False).logits for name in ("norms", "query_key", "rotated")}
    for name in ("query_key", "rotated"):
        if not torch.equal(logits[name], logits["norms"]):
            raise SystemExit(f"trial: {name} gives other logits than norms")


def measure(models: dict[str, nn.Module], batch: int, tokens: int, rounds: int, until: float) -> dict:
    """Alternating rounds, as many as end before `until` (of `time.perf_counter`), at least one."""
    for model in models.values():
        decode(model, batch, 4, static=False)
    samples: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds):
        for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(decode(models[name], batch, tokens, static=False))
        if time.perf_counter() > until:
            break
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, samples["norms"], strict=True))
        for name, values in samples.items()
    }
    return {
        "batch": batch,
        "rounds": len(samples["norms"]),
        "tokens_per_s": {name: round(statistics.median(values), 2) for name, values in samples.items()},
        "over_norms": {name: round(value, 4) for name, value in ratios.items()},
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens per round")
    parser.add_argument("--rounds", type=int, default=7, help="at most")
    parser.add_argument("--seconds", type=float, default=75.0, help="no round begins later than this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    check_model()
    begin, cuda = time.perf_counter(), torch.cuda.is_available()
    stock = build(options.shape, "cuda" if cuda else "cpu", options.layers)
    rotate: Rotate = Rotated(stock.config.head_dim) if cuda else model_own
    models = variants(stock, rotate)
    elements = check_rotation(rotate, models["norms"])
    check_logits(models)
    sync()
    print(f"bits: {elements} rotated elements and all logits equal, {time.perf_counter() - begin:.0f} s", flush=True)
    rows = []
    for number, batch in enumerate(options.batch, 1):
        left = begin + options.seconds - time.perf_counter()
        until = time.perf_counter() + left / (len(options.batch) - number + 1)
        rows.append(measure(models, batch, options.tokens, options.rounds, until))
        cells = "  ".join(f"{name} {rows[-1]['over_norms'][name]:.4f}x" for name in models)
        print(f"batch {batch}, {rows[-1]['rounds']} rounds, over today's patched: {cells}", flush=True)
    figure = min(row["over_norms"]["rotated"] for row in rows)
    word = "met" if figure >= AIM else "not met"
    where = torch.cuda.get_device_name() if cuda else "cpu, no kernel"
    print(f"rotation in the launch, over today's patched: {figure:.4f}x; aim {AIM}x: {word} ({where})")
    print(f"took {time.perf_counter() - begin:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
