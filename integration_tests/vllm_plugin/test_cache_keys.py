"""The keys under which Inductor keeps what it compiled for an engine, as far as our passes are in them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rmsnorm_patch.ops import sources
from rmsnorm_patch.vllm_plugin import calls, hooks
from rmsnorm_patch.vllm_plugin.decision import Decision
from rmsnorm_patch.vllm_plugin.passes import block_products


@pytest.mark.parametrize("one", hooks.PASSES, ids=lambda one: getattr(one, "name", "linear"))
def test_the_key_of_every_pass_of_the_plugin_has_the_digest(one: object, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = one.wrap_uuid(lambda manager: "manager")  # type: ignore[attr-defined]
    before = uuid(SimpleNamespace())
    assert sources.digest() in before
    monkeypatch.setattr(calls, "VERSION", "of another source")
    assert uuid(SimpleNamespace()) != before


def test_the_key_of_an_engine_has_what_its_trials_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is kept without a second trial of the libraries whose products it has parted."""
    settings = [{}, {"blocks": True}, {"blocks": True, "needs_blocks": True}]
    settings += [{"silu_quantised": schemes} for schemes in (("fp8_token",), ("fp8_token", "int8_token"))]
    decisions = [Decision("ir", "rmsnorm_patch", "", quantised=True, **each) for each in settings]  # type: ignore[arg-type]
    before = [hooks.fingerprint(decision, "") for decision in decisions]
    assert len(set(before)) == len(before)
    monkeypatch.setattr(block_products, "LIBRARIES", ("torch",))  # one that is installed here
    changed = [key != hooks.fingerprint(decision, "") for key, decision in zip(before, decisions, strict=True)]
    assert changed == [False, True, True, False, False]
