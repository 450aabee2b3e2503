"""The pass that joins products and norms behind vLLM's manager of passes: when it runs, its key, its warnings."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from lowered_layers import NORM, Layer, N, layer, same_bits
from torch import fx
from torch._inductor import config as inductor

from rmsnorm_patch.fused.linear_norm import op as linear_norm_op
from rmsnorm_patch.fused.linear_norm import splits as linear_norm_splits
from rmsnorm_patch.vllm_plugin import log
from rmsnorm_patch.vllm_plugin.decision import Decision
from rmsnorm_patch.vllm_plugin.passes import linear_norm


class Manager:
    """vLLM's manager of passes, as far as our hooks see it: the norms are in the graph once it was called."""

    def __init__(self, linear: bool = True, splits: str = "") -> None:
        self.rmsnorm_patch_linear = linear
        self.rmsnorm_patch_splits = splits
        self.found: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.found.append(str(graph))

    def uuid(self) -> str:
        return "manager"


call = linear_norm.wrap_call(Manager.__call__)


def test_the_pass_joins_after_the_manager() -> None:
    made, manager = layer(with_clone=True), Manager()
    before = str(made.graph)
    call(manager, made.graph)
    assert manager.found == [before]
    assert len(made.joined()) == 1


def test_the_pass_does_not_join_where_that_is_off() -> None:
    made, manager = layer(with_clone=True), Manager(linear=False)
    call(manager, made.graph)
    assert len(manager.found) == 1
    assert not made.joined()


def test_a_pass_that_was_made_before_the_hooks_joins_nothing() -> None:
    made, manager = layer(with_clone=True), Manager()
    del manager.rmsnorm_patch_linear, manager.rmsnorm_patch_splits
    call(manager, made.graph)
    assert not made.joined()
    assert linear_norm.wrap_uuid(Manager.uuid)(manager).startswith("manager")


@pytest.mark.parametrize("option", ["max_autotune", "max_autotune_gemm"])
def test_the_pass_leaves_products_that_the_compiler_tunes(option: str) -> None:
    made = layer(with_clone=True)
    with inductor.patch(**{option: True}):
        call(Manager(), made.graph)
    assert not made.joined()
    call(Manager(), made.graph)
    assert len(made.joined()) == 1


def test_a_failure_leaves_a_right_graph_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The second product's matrix does not tell its shape; the first one was joined before."""
    made = Layer()
    square = made.input("square", N, N)
    x = made.product(made.rows, made.matrix)
    made.norm(x, made.residual)
    second = made.product(x, square)
    made.norm(second, made.residual)
    made.made(second)
    del square.meta["val"]
    before, manager = made.run(), Manager()
    log.warn_once.cache_clear()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, logger=log.logger.name):
        for _ in range(2):
            call(manager, made.graph)
    assert [record.getMessage() for record in caplog.records] == [
        "rmsnorm_patch: not every product is joined with its norm: KeyError: 'val'"
    ]
    made.graph.lint()
    assert len(made.joined()) == 1
    assert NORM in made.targets()
    assert same_bits(made.run(), before)


def test_the_pass_has_another_cache_key_where_it_joins() -> None:
    uuid = linear_norm.wrap_uuid(Manager.uuid)
    on, off = uuid(Manager(linear=True)), uuid(Manager(linear=False))
    others = [uuid(Manager(splits=splits)) for splits in ("ahead 1 8", "ahead 1 8 reorder")]
    assert len({on, off, *others}) == 4
    assert all(key.startswith("manager") for key in (on, off, *others))


def test_each_engines_settings_reach_its_ops() -> None:
    """Two engines of one process: their graphs name their own settings, whichever of the arguments before are there."""
    for splits in ("ahead 1 8", "reorder", ""):
        made = layer(with_clone=True)
        call(Manager(splits=splits), made.graph)
        (joined,) = made.joined()
        named = joined.args[13:]
        assert named == ((splits,) if splits else ())
        assert linear_norm_op._bound(True, *joined.args[5:])[-1] is linear_norm_splits.finder_of(splits)


def test_what_an_engine_looks_at_ahead() -> None:
    linear = Decision("ir", "rmsnorm_patch", "", linear=True)
    for sizes, decision, settings in (
        ([8, 1, 512], linear, "ahead 1 8"),
        (None, linear, "ahead"),
        ([8, 1], replace(linear, reorder=True), "ahead 1 8 reorder"),
        ([8, 1], replace(linear, linear=False), ""),
    ):
        config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes))
        assert linear_norm.splits_of(config, decision) == settings
