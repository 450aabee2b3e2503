"""launcher.c in an attention: the norms of a query and its key in one launch, on the CPU with a driver that computes.

Where a check says no, nothing is launched and the norms' own arithmetic runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from native_driver import Driver, held, table_of_rotated, table_of_two
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import rmsnorm_patch
from rmsnorm_patch.pairs.rotation import known
from rmsnorm_patch.rewrite import layer_calls, native, observe, query_key

TOKENS = torch.arange(1, 8)[None]
LAYERS = 2


def serve(model: PreTrainedModel, path: Path) -> Driver:
    """Apply, and let launcher.c serve the queries and keys."""
    rmsnorm_patch.apply(model)
    for site in rmsnorm_patch.plan(model).fused_query_key():
        for norm in map(model.get_submodule, (site.query, site.key)):
            kernel, spec = layer_calls.kernel_of(norm), type(norm)._rmsnorm_patch_key.spec
            assert kernel is not None
            native.enroll_query_key(type(norm), kernel, table_of_two(spec, norm.weight.numel()))
            native.enroll_rotated(type(norm), kernel, table_of_rotated(spec, norm.weight.numel()))
    return Driver(path)


@pytest.fixture
def model(small_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return small_model("qwen3", torch.float32, num_hidden_layers=LAYERS)


@pytest.fixture
def served(model, launchers) -> tuple[PreTrainedModel, Driver]:
    return model, serve(model, launchers)


@pytest.fixture
def norms(served) -> tuple[nn.Module, nn.Module]:
    attention = served[0].model.layers[0].self_attn
    return attention.q_norm, attention.k_norm


def rows(*shape: int, n: int = 16) -> torch.Tensor:
    return torch.randn(*shape, n, generator=torch.Generator().manual_seed(sum(shape)))


def own(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    kernel = layer_calls.kernel_of(norm)
    assert kernel is not None
    return kernel.original(norm, x)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def call(norms: tuple[nn.Module, nn.Module], q: torch.Tensor, k: torch.Tensor) -> None:
    """Both results are right, whoever computed them."""
    with torch.no_grad():
        for norm, x, y in zip(norms, (q, k), query_key.query_key(*norms, q, k), strict=True):
            assert close(y, own(norm, x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_a_model_computes_what_it_did(small_model, launchers, kind: str, mode) -> None:
    """Gemma's norms read a transposed view: rows of two levels. Its 1 + w is none that the driver computes."""
    model = small_model(kind, torch.float32, num_hidden_layers=LAYERS)
    if kind == "gemma3_text":
        model.apply(lambda module: nn.init.zeros_(module.weight) if "norm" in str(type(module)).lower() else None)
    with mode():
        before = model(TOKENS).logits
        found = serve(model, launchers)
        if kind == "gemma3_text":
            for norm in (m for name, m in model.named_modules() if name.endswith(("q_norm", "k_norm"))):
                norm.weight.data = torch.ones_like(norm.weight)
            model(TOKENS)
            assert found.launches == LAYERS
            return
        events: list[observe.Event] = []
        with observe.observing(events.append):
            after = model(TOKENS).logits
    shared = [event for event in events if event.kind == "together"]
    assert found.launches == LAYERS
    assert len(shared) == 2 * LAYERS
    assert {event.backend for event in shared} == {"cuda"}
    assert all(event.rotation is not None for event in shared)
    assert close(before, after)
    counts = rmsnorm_patch.status(model).counts()
    assert (counts["rotated"], counts["together"]) == (2 * LAYERS, 0)


@pytest.mark.parametrize(
    ("q", "k"),
    [
        (rows(2, 3, 4), rows(2, 3, 2)),
        (rows(1, 3, 4).transpose(1, 2), rows(1, 3, 2).transpose(1, 2)),
        (rows(2, 3, 8)[:, :, ::2], rows(2, 3, 2)),
        (rows(2, 3, 4, n=32)[..., :16], rows(1, 3, 2).transpose(1, 2)),
        (rows(), rows(1, 1, 5)),
    ],
    ids=["contiguous", "transposed", "every other head", "half of a row", "one row"],
)
def test_rows_wherever_they_lie(served, norms, q, k) -> None:
    _, found = served
    call(norms, q, k)
    assert found.launches == 1


def test_shapes_take_turns(served, norms) -> None:
    _, found = served
    for length in (1, 3, 1, 2):
        call(norms, rows(2, length, 4), rows(2, length, 2))
    assert found.launches == 4


@pytest.mark.parametrize(
    ("q", "k"),
    [
        (rows(2, 3, 4).double(), rows(2, 3, 2).double()),
        (rows(2, 3, 4).bfloat16(), rows(2, 3, 2)),
        (rows(0, 3, 4), rows(0, 3, 2)),
        (rows(2, 3, 4, n=32)[..., ::2], rows(2, 3, 2)),
        (rows(2, 3, 4).transpose(1, 2), rows(2, 3, 2).transpose(1, 2)),
    ],
    ids=["doubles", "two dtypes", "no rows", "strided elements", "three levels"],
)
def test_other_tensors_are_normed_by_the_norms(served, norms, q, k) -> None:
    _, found = served
    call(norms, q, k)
    assert found.launches == 0


class Modes(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", [Modes, Dispatch, lambda: torch.autocast("cpu"), nullcontext])
def test_who_must_see_the_ops_sees_them(served, norms, around) -> None:
    _, found = served
    with torch.no_grad(), around():
        query_key.query_key(*norms, rows(2, 3, 4), rows(2, 3, 2))
    assert found.launches == (around is nullcontext)


def test_eps_and_weights_are_the_modules_at_the_call(served, norms) -> None:
    _, found = served
    q_norm, k_norm = norms
    q_norm.variance_epsilon = k_norm.variance_epsilon = 0.5
    k_norm.weight = nn.Parameter(torch.full_like(k_norm.weight, 3.0))
    call(norms, rows(2, 3, 4), rows(2, 3, 2))
    assert found.eps() == [0.5]
    k_norm.variance_epsilon = 0.25
    call(norms, rows(2, 3, 4), rows(2, 3, 2))
    k_norm.variance_epsilon = torch.tensor(0.5)
    call(norms, rows(2, 3, 4), rows(2, 3, 2))
    assert found.launches == 1


@pytest.mark.parametrize("which", [0, 1])
def test_a_norm_that_is_watched_is_called(served, norms, which: int) -> None:
    model, found = served
    seen: list[int] = []
    handle = norms[which].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(TOKENS)
        assert (found.launches, seen) == (LAYERS - 1, [1])
        handle.remove()
        norms[which].train()
        model(TOKENS)
    assert found.launches == 2 * (LAYERS - 1)


def test_a_refused_launch_runs_the_norms(served, norms) -> None:
    _, found = served
    found.library.set_result(1)
    call(norms, rows(2, 3, 4), rows(2, 3, 2))
    assert found.launches == 0


def test_nothing_is_leaked(served, norms, collect_garbage) -> None:
    q, k = rows(2, 3, 4), rows(2, 3, 2)
    refused = rows(2, 3, 2).double()
    watched = (q, k, refused, *norms, *(norm.weight for norm in norms), norms[0].variance_epsilon)
    with torch.no_grad():
        for _ in range(10):
            query_key.query_key(*norms, q, k)
            query_key.query_key(*norms, q, refused)
        objects, counts = held(watched, collect_garbage)
        for _ in range(50):
            query_key.query_key(*norms, q, k)
            query_key.query_key(*norms, q, refused)
        objects_after, counts_after = held(watched, collect_garbage)
    assert counts_after == counts
    assert abs(objects_after - objects) < 50


# with the rotation


def angles(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(batch, length).cos(), rows(batch, length).sin()


def turn(norms: tuple[nn.Module, nn.Module], axis: int, q: torch.Tensor, k: torch.Tensor, *given: torch.Tensor) -> None:
    """Both results are right, and lie as the model's own, whoever computed them."""
    with torch.no_grad():
        made = query_key.rotated(*norms, axis, q, k, *given, apply_rotary_pos_emb)
        normed = [
            own(norm, x) if axis == 1 else own(norm, x).transpose(1, 2) for norm, x in zip(norms, (q, k), strict=True)
        ]
        for one, other in zip(made, apply_rotary_pos_emb(*normed, *given), strict=True):
            assert close(one, other)
            assert one.dtype == other.dtype
            sizes = [(size, stride) for size, stride in zip(one.shape, one.stride(), strict=True) if size > 1]
            assert sizes == [each for each in zip(other.shape, other.stride(), strict=True) if each[0] > 1]


@pytest.fixture
def turned(served) -> tuple[PreTrainedModel, Driver]:
    """The function is known, as it is where a model was planned."""
    assert known(apply_rotary_pos_emb) is not None
    return served


@pytest.mark.parametrize(
    ("axis", "q", "k", "cos"),
    [
        (2, rows(2, 3, 4), rows(2, 3, 2), angles(1, 3)),
        (2, rows(2, 3, 4), rows(2, 3, 2), angles(2, 3)),
        (2, rows(2, 1, 4), rows(2, 1, 2), angles(1, 1)),
        (2, rows(3, 1, 4), rows(3, 1, 1), angles(3, 1)),
        (1, rows(2, 3, 4).transpose(1, 2), rows(2, 3, 2).transpose(1, 2), angles(2, 3)),
        (2, rows(2, 3, 8)[:, :, 2:6], rows(2, 3, 8)[:, :, 6:], angles(1, 3)),
        (2, rows(2, 3, 8)[:, :, ::2], rows(2, 3, 2), angles(1, 3)),
        (2, rows(1, 1, 1), rows(1, 1, 1), angles(1, 1)),
    ],
    ids=["prompt", "angles each", "a token", "tokens", "transposed", "of one product", "every other head", "one row"],
)
def test_rows_are_rotated_wherever_they_lie(turned, norms, axis: int, q, k, cos) -> None:
    _, found = turned
    turn(norms, axis, q, k, *cos)
    assert found.launches == 1


@pytest.mark.parametrize(
    ("axis", "q", "k", "cos"),
    [
        (2, rows(2, 3, 4).double(), rows(2, 3, 2).double(), tuple(each.double() for each in angles(1, 3))),
        (1, rows(2, 4, 3), rows(2, 2, 3), angles(1, 3)),
        (1, rows(1, 4, 3), rows(1, 2, 3), angles(1, 3)),
        (2, rows(2, 3, 4), rows(2, 3, 2), tuple(each.double() for each in angles(1, 3))),
        (2, rows(2, 3, 4), rows(2, 3, 2), (angles(1, 3)[0].expand(2, 3, 16), angles(2, 3)[1])),
        (2, rows(2, 3, 4), rows(2, 3, 2), (angles(1, 3)[0], angles(2, 3)[1])),
        (2, rows(2, 3, 4), rows(2, 3, 2), angles(1, 1)),
        (2, rows(2, 3, 4, n=32)[..., ::2], rows(2, 3, 2), angles(1, 3)),
    ],
    ids=[
        *("doubles", "head by head", "one sequence head by head", "angles of another dtype", "a view of angles"),
        *("angles of two shapes", "one angle for all", "strided elements"),
    ],
)
def test_other_tensors_are_rotated_by_the_model(turned, norms, axis: int, q, k, cos) -> None:
    """On a CPU that is by the model's own operations."""
    _, found = turned
    turn(norms, axis, q, k, *cos)
    assert found.launches == 0


def test_angles_of_another_batch_are_refused_as_the_model_refuses_them(turned, norms) -> None:
    _, found = turned
    for batch in (2, 3):
        with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size"):
            query_key.rotated(*norms, 2, rows(4, 3, 4), rows(4, 3, 2), *angles(batch, 3), apply_rotary_pos_emb)
    assert found.launches == 0


@pytest.mark.parametrize("around", [Modes, Dispatch, lambda: torch.autocast("cpu"), nullcontext])
def test_who_must_see_the_ops_sees_the_rotation(turned, norms, around) -> None:
    _, found = turned
    with torch.no_grad(), around():
        query_key.rotated(*norms, 2, rows(2, 3, 4), rows(2, 3, 2), *angles(1, 3), apply_rotary_pos_emb)
    assert found.launches == (around is nullcontext)


def test_shapes_take_turns_with_their_rotation(turned, norms) -> None:
    _, found = turned
    for length in (1, 3, 1, 2):
        turn(norms, 2, rows(2, length, 4), rows(2, length, 2), *angles(1, length))
        turn(norms, 1, rows(2, length, 4).transpose(1, 2), rows(2, length, 2).transpose(1, 2), *angles(1, length))
    assert found.launches == 8


def test_another_rotation_is_the_models_own(turned, norms) -> None:
    model, found = turned

    def other(q, k, cos, sin):
        return q + 1, k - 1

    with torch.no_grad():
        made = query_key.rotated(*norms, 2, rows(2, 3, 4), rows(2, 3, 2), *angles(1, 3), other)
    assert close(made[0], own(norms[0], rows(2, 3, 4)).transpose(1, 2) + 1)
    assert close(made[1], own(norms[1], rows(2, 3, 2)).transpose(1, 2) - 1)
    assert found.launches == 1  # of the norms
    counts = rmsnorm_patch.status(model).counts()
    assert (counts["rotated"], counts["together"]) == (0, 2)


def test_no_reference_is_leaked_by_a_rotation(turned, norms, collect_garbage) -> None:
    q, k, (cos, sin) = rows(2, 3, 4), rows(2, 3, 2), angles(1, 3)
    refused = cos.double()
    watched = (q, k, cos, sin, refused, *norms, *(norm.weight for norm in norms), norms[0].variance_epsilon)

    def calls(count: int) -> None:
        for at in range(count):
            length = 1 + at % 2  # shapes that take turns
            query_key.rotated(*norms, 2, q, k, cos, sin, apply_rotary_pos_emb)
            query_key.rotated(*norms, 2, q, k, refused, sin, apply_rotary_pos_emb)
            query_key.rotated(*norms, 2, q[:, :length], k[:, :length], *angles(1, length), apply_rotary_pos_emb)

    with torch.no_grad():
        calls(10)
        objects, counts = held(watched, collect_garbage)
        calls(50)
        objects_after, counts_after = held(watched, collect_garbage)
    assert counts_after == counts
    assert abs(objects_after - objects) < 50
