"""DTensor, FSDP, ZeRO-3, tensor parallelism, quantised weights: left alone, or right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn as nn

import rmsnorm_patch
from rmsnorm_patch.rewrite import guards

DISTRIBUTED = """
import sys, traceback, torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
import rmsnorm_patch
from rmsnorm_patch.patch_state import STATE, derives_from_patched


dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (1,))


def build():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    return model


ids = torch.arange(14).view(2, 7) * 5


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2_norms(model):
    from torch.distributed.fsdp import fully_shard
    fully_shard(model.model.norm, mesh=mesh)
    fully_shard(model.model.layers[0].input_layernorm, mesh=mesh)
    return model


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    import functools
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FSDP(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def dtensor_norms(model):
    from torch.distributed.tensor import Replicate, distribute_tensor
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, torch.nn.Parameter(distribute_tensor(p, mesh, [Replicate()])))
    return model


def sequence_parallel_norm(model):
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
    from torch.distributed.tensor import Replicate
    parallelize_module(model.model.norm, mesh, SequenceParallel(use_local_output=True))
    return model


def logits(model, way):
    with torch.no_grad():
        x = ids
        if way == "dtensor_norms":
            from torch.distributed.tensor import Replicate, distribute_tensor
            from torch.distributed.tensor.experimental import implicit_replication
            with implicit_replication():
                out = model(distribute_tensor(x, mesh, [Replicate()])).logits
        else:
            out = model(x).logits
        return out.full_tensor() if hasattr(out, "full_tensor") else out


def check(way):
    wrap = globals()[way]
    expected = logits(wrap(build()), way)
    before = wrap(build())
    rmsnorm_patch.apply(before)
    assert torch.equal(logits(before, way), expected), "patched after wrapping"
    after = build()
    rmsnorm_patch.apply(after)
    after = wrap(after)
    assert torch.equal(logits(after, way), expected), "wrapped after patching"
    assert torch.equal(logits(after, way), expected), "second call"
    for model in (before, after):
        rmsnorm_patch.revert(model)
        assert not any(derives_from_patched(type(m)) for m in model.modules())
        assert not any(STATE in m.__dict__ for m in model.modules())
        assert torch.equal(logits(model, way), expected), "reverted"
    if way in ("fsdp2", "fsdp1", "ddp"):
        def gradients(model):
            model.train()(ids, labels=ids).loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        plain = gradients(wrap(build()))
        patched = build()
        rmsnorm_patch.apply(patched)
        ours = gradients(wrap(patched))
        assert len(plain) == len(ours) > 2
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)), "gradients"


for way in sys.argv[2:]:
    try:
        check(way)
        print(way, "right")
    except Exception:
        traceback.print_exc()
        print(way, traceback.format_exc(limit=-1).replace(chr(10), " "))
dist.destroy_process_group()
"""


WAYS = ["fsdp2", "fsdp2_norms", "fsdp1", "ddp", "dtensor_norms", "sequence_parallel_norm"]


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """What one process of a gloo group of one says about each way."""
    rendezvous = tmp_path_factory.mktemp("gloo") / "rendezvous"
    done = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED, str(rendezvous), *WAYS],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_distributed_wrappers_in_both_orders(distributed, way):
    assert distributed[way] == "right"


def _zero3(model):
    """As ZeRO-3 does: outside a module's forward its parameters are empty; hooks gather and release them."""
    for module in model.modules():
        own = list(module._parameters.items())
        if not own:
            continue
        full = {name: p.detach().clone() for name, p in own if p is not None}

        def gather(module, arguments, full=full):
            for name, value in full.items():
                module._parameters[name].data = value

        def release(module, arguments, output, full=full):
            for name in full:
                module._parameters[name].data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        for name in full:
            module._parameters[name].data = torch.empty(0)
    return model


def test_zero3_like_empty_weights_are_left_alone(small_model, snapshot):
    model = _zero3(small_model("llama"))
    before = snapshot(model)
    with pytest.raises(rmsnorm_patch.UnsupportedModel, match="ZeRO-3"):
        rmsnorm_patch.apply(model)
    assert snapshot(model) == before


def test_weights_that_become_empty_after_patching(small_model, run, ids):
    expected = run(small_model("llama"), ids)
    model = small_model("llama")
    rmsnorm_patch.apply(model)
    run(model, ids)
    after = run(_zero3(model), ids)
    assert after.logits.equal(expected.logits)
    assert after.kinds["taken"] == 0


class Packed(torch.Tensor):
    """A weight stored in int8 with a scale: every op sees its dequantised value."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def value(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = torch.utils._pytree.tree_map(lambda a: a.value() if isinstance(a, cls) else a, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


@pytest.mark.parametrize("order", ["quantised first", "quantised after"])
def test_quantised_norm_weights(small_model, run, ids, order):
    def quantise(model):
        for module in model.modules():
            if "Norm" in type(module).__name__:
                scale = module.weight.detach().abs().max() / 127
                codes = (module.weight.detach() / scale).round().to(torch.int8)
                module.weight = nn.Parameter(Packed(codes, scale), requires_grad=False)
        return model

    expected = run(quantise(small_model("llama")), ids)
    model = small_model("llama")
    if order == "quantised first":
        model = quantise(model)
        rmsnorm_patch.apply(model)
    else:
        rmsnorm_patch.apply(model)
        run(model, ids)
        model = quantise(model)
    assert run(model, ids).same_as(expected)
    assert not guards.servable(torch.randn(2, 64), model.model.norm.weight)
    assert guards.reason(torch.randn(2, 64), model.model.norm.weight) == "weight is a Packed"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["quantised first", "quantised after"])
def test_dynamically_quantised_linear_layers(small_model, run, ids, order):
    from torch.ao.quantization import quantize_dynamic

    def quantise(model):
        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)

    expected = run(quantise(small_model("llama")), ids)
    model = small_model("llama")
    if order == "quantised first":
        model = quantise(model)
        rmsnorm_patch.apply(model)
    else:
        rmsnorm_patch.apply(model)
        model = quantise(model)
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds["in_layer"] == 2
    rmsnorm_patch.revert(model)
    assert run(model, ids).same_as(expected)


def test_a_model_on_meta_can_be_planned_and_patched_then_loaded(small_model, run, ids):
    source = small_model("llama")
    expected = run(source, ids)
    with torch.device("meta"):
        model = type(source)(source.config).eval()
    assert rmsnorm_patch.plan(model).counts() == rmsnorm_patch.plan(source).counts()
    rmsnorm_patch.apply(model)
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = source.model.rotary_emb
    after = run(model, ids)
    assert after.same_as(expected)
    assert after.kinds["taken"] == 2
