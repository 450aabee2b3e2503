"""The providers that this machine has."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection

from ...numerics.spec import NormSpec
from ..rows import named
from . import norms, quantised, query_key  # noqa: F401  each enters its providers
from .table import MAKERS, OURS_BY_OP, Provider


def load(
    op: str,
    spec: NormSpec,
    only_ours: bool = False,
    extra: Collection[str] = (),
    wanted: Collection[str] = (),
) -> tuple[list[Provider], dict[str, str]]:
    """The providers of `op` that this machine has, and why the others are missing.

    wanted: names; empty: all. extra: "[name=]module:function" entries; the function takes a built-in one's arguments.
    """
    present, missing = [], {}
    for (name, of), (make, in_place) in MAKERS.items():
        if of != op or (only_ours and (name, of) not in OURS_BY_OP) or (wanted and name not in wanted):
            continue
        try:
            present.append(Provider(name, op, make(spec), in_place))
        except Exception as error:  # a peer that does not import or build on this machine is a missing row, not a crash
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return present + [_from_outside(entry, op) for entry in extra if not only_ours], missing


def _from_outside(entry: str, op: str) -> Provider:
    name, path = named(entry)
    module, _, function = path.partition(":")
    if not function:
        raise SystemExit(f"--provider {entry}: write it as module:function or name=module:function")
    sys.path.insert(0, os.getcwd())
    return Provider(name, op, getattr(importlib.import_module(module), function))
