"""What the Triton kernels say in PTX, in the CPU interpreter: it stands where it should and is handed what it should,
and the rows come out as they do without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from rmsnorm_patch import ops
from rmsnorm_patch.backends.triton import loader
from rmsnorm_patch.backends.triton.backend import Layout, Target
from rmsnorm_patch.fused.gated_norm import op as gated
from rmsnorm_patch.fused.norm_add.op import bind_norm_add, bind_norm_add_norm
from rmsnorm_patch.fused.norm_quantised.op import quant_args
from rmsnorm_patch.fused.silu_quantised.op import silu_args
from rmsnorm_patch.numerics import reference
from rmsnorm_patch.numerics.gating import GateSpec
from rmsnorm_patch.numerics.quantisation import QuantSpec
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY, GEMMA, LLAMA, NormSpec

BF16, EPS = torch.bfloat16, 1e-6
FP32_SUM = NormSpec(round_before_weight="none", output="input", sum="fp32")
STREAMED = 70000
"""Columns of a row that is read twice."""
EFFECTS = ("wait", "launch", "prefetch", "now")
"""Kinds that do something beside giving a value: no compiler may drop, double or move them."""


class Said(NamedTuple):
    """One instruction. values: what it is handed, as arrays."""

    kind: str
    values: tuple[np.ndarray, ...] = ()
    pure: bool = False
    pack: int = 1


KINDS = {
    "griddepcontrol.wait": "wait",
    "griddepcontrol.launch_dependents": "launch",
    "cp.async.bulk.prefetch.L2": "prefetch",
    "xor.b32": "xor",
    "mov.b32 $0, $1": "now",
    "add.rn.f32": "add",
    "div.approx.ftz.f32": "div",
    "rcp.approx.ftz.f32": "rcp",
}


def as_on_sm90(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the kernels are those of such a device."""
    ops.forget()
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device, dependent=True: cls.nvidia(9, dependent)))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Said]]:
    """Programs, what they say, loads and stores in the order in which the interpreter comes to them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loader.load("row_math", interpreted=True)
    from triton.runtime import interpreter

    found: list[Said] = []

    class Answer:
        def __init__(self, data: np.ndarray, of: Any) -> None:
            self.handle = interpreter.TensorHandle(data, of)

        def get_result(self, _: int) -> Any:
            return self.handle

    def assembly(text: str, _: str, values: list[Any], types: list[Any], pure: bool, pack: int) -> Answer:
        kind = next(kind for start, kind in KINDS.items() if start in text)
        data = [value.data for value in values]
        if kind == "now" and data[0].dtype.itemsize == 2:
            kind = "pairs"
        found.append(Said(kind, tuple(each.copy() for each in data), pure, pack))
        if kind == "xor":  # a register holds two columns, and the first register of two zeros is taken
            pairs = data[0].reshape(-1, 2).view(np.uint32) ^ data[1].reshape(-1, 2)[:, :1].astype(np.uint32)
            return Answer(pairs.view(data[0].dtype).reshape(data[0].shape), values[0].dtype.scalar)
        if kind == "add":
            return Answer(data[0] + data[1], values[0].dtype.scalar)
        if kind in ("div", "rcp"):
            return Answer(data[0] / data[1] if kind == "div" else 1 / data[0], values[0].dtype.scalar)
        if kind in EFFECTS and kind != "now":
            return Answer(np.zeros(1, np.int32), types[0])
        return Answer(data[0], values[0].dtype.scalar)

    def told(name: str, kind: str) -> None:
        inherited = getattr(interpreter.interpreter_builder, name)

        def heard(*args: Any) -> Any:
            addresses: tuple[np.ndarray, ...] = ()
            if kind in ("load", "store"):
                mask = args[1 if kind == "load" else 2]
                addresses = (args[0].data[np.broadcast_to(mask.data, args[0].data.shape)],)
            found.append(Said(kind, addresses))
            return inherited(*args)

        monkeypatch.setattr(interpreter.interpreter_builder, name, heard)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_inline_asm", assembly, raising=False)
    # Of a block of pointers the interpreter tells the block as what they point to.
    width = property(lambda block: block.scalar.primitive_bitwidth)
    monkeypatch.setattr(tl.block_type, "primitive_bitwidth", width, raising=False)
    told("create_masked_load", "load")  # what has no mask comes to these with a full one
    told("create_masked_store", "store")
    told("create_barrier", "barrier")
    told("set_grid_idx", "program")
    ops.forget()
    yield found
    ops.forget()


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16)


def quantised(spec: NormSpec, quant: QuantSpec) -> Callable[..., Any]:
    def call(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        rest = (weight, None, quant.scheme, EPS, *ops.spec_args(spec, "triton"), *quant_args(quant, True))
        rows, scales, normed = torch.ops.rmsnorm_patch.fused_add_rms_norm_quantised_(x, kept := residual.clone(), *rest)
        return rows.view(torch.int8), scales, normed, kept

    return call


def in_place(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    ops.bind_fused_add_rms_norm_(LLAMA, "triton")(x := x.clone(), residual := residual.clone(), weight, EPS)
    return x, residual


def silu(x: torch.Tensor, *_: torch.Tensor) -> Any:
    """Of both halves of `x`, but for an odd last column."""
    quant = QuantSpec("fp8_token")
    arguments = (x[:, : x.shape[1] // 2 * 2], None, quant.scheme, *silu_args("rounded", quant), "triton")
    rows, scales = torch.ops.rmsnorm_patch.silu_and_mul_quantised(*arguments)
    return rows.view(torch.int8), scales


CALLS: dict[str, Callable[..., Any]] = {
    "norm": lambda x, _, weight: ops.bind_rms_norm(LLAMA, "triton")(x, weight, EPS),
    "fused": lambda x, residual, weight: ops.bind_fused_add_rms_norm(GEMMA, "triton")(x, residual, weight, EPS),
    "fused, fp32": lambda x, r, weight: ops.bind_fused_add_rms_norm(FP32_SUM, "triton")(x, r, weight, EPS),
    "in place": in_place,
    "add": lambda x, residual, weight: bind_norm_add(LLAMA, "triton")(x, residual, weight, EPS),
    "add, norm": lambda x, r, weight: bind_norm_add_norm(LLAMA, "triton")(x, r, weight, EPS, weight, EPS),
    "gated": lambda x, gate, weight: gated.bind(
        FP32_WEIGHT_MULTIPLY, GateSpec("silu", "norm_first"), "triton"
    )(x, gate, weight, EPS),
    "gate first": lambda x, gate, weight: gated.bind(
        FP32_WEIGHT_MULTIPLY, GateSpec("silu", "gate_first"), "triton"
    )(x, gate, weight, EPS),
    "quantised": quantised(LLAMA, QuantSpec("fp8_token")),
    "quantised, fp32": quantised(FP32_SUM, QuantSpec("fp8_token")),
    "blocks": quantised(LLAMA, QuantSpec("fp8_block", "rounded", "flashinfer")),
    "blocks, fp32": quantised(FP32_SUM, QuantSpec("fp8_block")),
    "silu": silu,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of groups of zeros, on purpose


def calls(*lengths: int) -> list[tuple[str, int]]:
    """Each at each length, but what differs in rows that are read again alone."""
    long = ("quantised, fp32", "blocks, fp32")
    return [(name, n) for name in CALLS for n in lengths if n == STREAMED or name not in long]


@pytest.mark.parametrize(("name", "n"), calls(128, 1600, 5125, 40000, STREAMED))
def test_rows_are_the_same_and_nothing_is_read_above_the_wait(
    name: str, n: int, said: list[Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, so that a kernel has one program. It waits once, and once it lets the next kernel start."""
    operands = rand(1, n), rand(1, n + 1)[:, 1:].clone(), rand(n)
    plain = CALLS[name](*operands)
    assert {each.kind for each in said} <= {"program", "load", "store", "barrier"}, "plain launches say nothing"
    said.clear()
    as_on_sm90(monkeypatch)
    found = CALLS[name](*operands)
    for got, want in zip(
        *((each,) if isinstance(each, torch.Tensor) else each for each in (found, plain)), strict=True
    ):
        assert torch.equal(got, want)
    assert said[0].kind == "program"
    for kinds in " ".join(each.kind for each in said).split("program")[1:]:
        above, below = kinds.split("wait")
        assert set(above.split()) <= {"prefetch"}
        assert "prefetch" not in below
        reads, rest = below.split("launch")
        assert "load" in reads, "the next kernel starts when rows are on their way"
        assert "store" in rest
    for each in said:
        if each.kind in (*KINDS.values(), "pairs"):
            assert each.pure == (each.kind not in EFFECTS)
            assert each.pack == (2 if each.kind in ("xor", "pairs") else 1)
    assert not any(each.values[1].any() for each in said if each.kind == "xor")


@pytest.mark.parametrize(("name", "n"), calls(7, 100, 128, 512, 1600, 5125, 40001, STREAMED))
def test_each_element_is_read_and_written_once_and_nothing_outside(name: str, n: int, said: list[Said]) -> None:
    """Neither behind the last row, where a program has more rows than there are, nor behind the last column. What does
    not stay in registers is read again, and the weight where results are computed twice."""
    if name == "add, norm" and n > 128:
        pytest.skip("not served by one Triton kernel")
    if name == "silu" and n in (100, 5125, 40001):
        pytest.skip("halves that are less aligned than their length allows are copied, and the copy is read")
    operands = rand(3, n), rand(3, n + 1)[:, 1:].clone(), rand(n)
    found = CALLS[name](*operands)
    tensors = (*operands, *((found,) if isinstance(found, torch.Tensor) else found))
    spans = [(each.data_ptr(), each.data_ptr() + each.numel() * each.element_size()) for each in tensors]
    for each in said:
        if each.kind in ("load", "store") and each.values[0].size:
            least, most = int(each.values[0].min()), int(each.values[0].max())
            assert any(first <= least and most < behind for first, behind in spans), each.kind
    assert times(said, "store", spans) == 1
    if n < 40000 or (n < STREAMED and not name.endswith("fp32")):
        assert times(said, "load", spans[:2] + spans[3:]) == 1
        twice = n > 40000 and name.startswith(("quantised", "blocks"))
        if not twice and name not in ("add, norm", "silu"):  # one weight stands for both norms there, and for none
            assert times(said, "load", spans[2:3]) == [each.kind for each in said].count("program")


def times(said: list[Said], kind: str, spans: list[tuple[int, int]]) -> int:
    """How often an address in `spans` was loaded or stored, where that was most often."""
    found = np.concatenate([np.unique(each.values[0]) for each in said if each.kind == kind])
    inside = np.any([(first <= found) & (found < behind) for first, behind in spans], axis=0)
    return int(np.unique(found[inside], return_counts=True)[1].max())


@pytest.mark.parametrize(
    ("name", "n", "kinds"),
    [
        ("norm", 1600, {"xor": 2}),
        ("norm", STREAMED, {"xor": 5}),  # of nine chunks five stay in registers
        ("fused", 1600, {"pairs": 1, "now": 1, "xor": 1}),
        ("fused", STREAMED, {"pairs": 5, "now": 3, "xor": 5, "barrier": 1}),  # in batches of two chunks
        ("fused, fp32", STREAMED, {"pairs": 1, "now": 1, "barrier": 1}),
        ("add, norm", 100, {"xor": 2}),
        ("gated", STREAMED, {}),
        ("quantised", 1600, {}),
        ("quantised", STREAMED, {"pairs": 9, "now": 9, "xor": 10, "barrier": 1}),  # results are computed twice
        ("quantised, fp32", STREAMED, {"now": 9, "barrier": 9}),  # one more for each chunk that is read again
        ("blocks", 40000, {"pairs": 5, "now": 5, "xor": 5}),
        ("blocks", STREAMED, {"pairs": 9, "now": 9, "xor": 5, "barrier": 1}),
        ("blocks, fp32", 1600, {}),
        ("blocks, fp32", STREAMED, {"now": 9, "barrier": 9}),
    ],
)
def test_what_keeps_registers_free_and_threads_together(
    name: str, n: int, kinds: dict[str, int], said: list[Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a row, by its length and by what of it is kept."""
    as_on_sm90(monkeypatch)
    CALLS[name](rand(1, n), rand(1, n), rand(n))
    assert Counter(each.kind for each in said if each.kind in ("xor", "pairs", "now", "barrier")) == kinds


@pytest.mark.parametrize("name", ["fused", "in place", "quantised"])
def test_a_sum_that_is_read_back_was_written_by_all_threads(name: str, said: list[Said]) -> None:
    CALLS[name](rand(1, STREAMED), rand(1, STREAMED), rand(STREAMED))
    below = [each.kind for each in said][[each.kind for each in said].index("barrier") :]
    assert [each.kind for each in said].count("barrier") == 1
    assert {"load", "store"} <= set(below)


def test_two_groups_have_weights_of_their_own(said: list[Said]) -> None:
    x, weight, spec = rand(3, 128), rand(128), NormSpec(group=64)
    found = ops.bind_rms_norm(spec, "triton")(x, weight, EPS)
    torch.testing.assert_close(found, reference.rms_norm(x, weight, spec, EPS))
    assert said


@pytest.mark.parametrize("nvidia", [False, True])
def test_a_sum_of_negative_zeros_is_one(nvidia: bool, said: list[Said], monkeypatch: pytest.MonkeyPatch) -> None:
    if nvidia:
        as_on_sm90(monkeypatch)
    zeros = torch.full((2, 128), -0.0, dtype=BF16)
    found = bind_norm_add(LLAMA, "triton")(zeros, zeros, torch.ones(128, dtype=BF16), EPS)
    assert ("add" in {each.kind for each in said}) == nvidia
    assert torch.equal(found, zeros)
    assert found.signbit().all()


def test_a_norm_without_a_weight_asks_for_none(said: list[Said], monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_sm90(monkeypatch)
    x, spec = rand(1, 1024), NormSpec(has_weight=False)
    ops.bind_rms_norm(spec, "triton")(x, None, EPS)
    ops.bind_fused_add_rms_norm(spec, "triton")(x, x, None, EPS)
    kinds = [each.kind for each in said]
    assert (kinds.count("wait"), kinds.count("prefetch")) == (2, 0)


@pytest.mark.parametrize("rows", [1023, 1024])
@pytest.mark.parametrize(
    ("op", "n", "asked"),
    [
        ("rms_norm", 1024, ("weight",)),
        ("rms_norm", 5125, ("weight",)),
        ("rms_norm", 16384, ("x", "weight")),
        ("rms_norm", 20489, ("x", "weight")),
        ("fused_add_rms_norm", 1024, ("weight",)),
        ("fused_add_rms_norm", 20489, ("x", "residual")),
        ("rms_norm", 131072, ("weight",)),
    ],
)
def test_what_is_asked_into_the_cache(op: str, n: int, asked: tuple[str, ...], rows: int, said: list[Said]) -> None:
    """The whole rows of many, and the whole weight, in units of 16 bytes: none in front of them and none behind."""
    layout = Layout(op, LLAMA, BF16, n, BF16, Target.nvidia(9))
    fused = op != "rms_norm"
    start = 0 if layout.vec > 1 else 3
    size = n * layout.schedule.rows  # of the one program that runs
    tensors = {name: rand(size + 3)[start : start + size] for name in ("x", "residual", "weight", "y", "total")}
    if not fused:
        del tensors["residual"], tensors["total"]
    constants = {**layout.constants, "NESTED": False}
    if fused:
        constants |= {"ROUND_SUM": True, "IN_PLACE": False}
    kernel = getattr(loader.load(op, interpreted=True), op)
    kernel[(1, 1, 1)](*tensors.values(), EPS, rows, *layout.dense[int(fused)], **constants, **layout.options)
    found = [tuple(int(value.reshape(-1)[0]) for value in each.values) for each in said if each.kind == "prefetch"]
    expected = []
    for name in asked:
        if name == "weight" or rows >= 1024:
            first = tensors[name].data_ptr()
            last = first + 2 * n
            expected.append((first // 16 * 16, -(-last // 16) * 16 - first // 16 * 16))
    assert found == expected
