"""LoRA adapters as PEFT writes them, for checkpoints of these tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4
TARGETS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def write_adapter(checkpoint: Path, folder: Path, std: float) -> Path:
    """An adapter of every projection of a Llama, in `folder`. std: of its weights, which are random."""
    config = json.loads((checkpoint / "config.json").read_text())
    hidden, inner, queries = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // queries
    written = {"q_proj": queries * head, "o_proj": hidden, "down_proj": hidden, "gate_proj": inner, "up_proj": inner}
    read = {"o_proj": queries * head, "down_proj": inner}
    keys = config["num_key_value_heads"] * head
    generator, weights = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for layer in range(config["num_hidden_layers"]):
        for part, names in TARGETS.items():
            for name in names:
                sizes = {"A": (RANK, read.get(name, hidden)), "B": (written.get(name, keys), RANK)}
                for letter, size in sizes.items():
                    place = f"base_model.model.model.layers.{layer}.{part}.{name}.lora_{letter}.weight"
                    weights[place] = std * torch.randn(size, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [name for names in TARGETS.values() for name in names]
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder
