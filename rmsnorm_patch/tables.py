"""Plans, proofs and measurements as tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .env import EngineState, Environment
from .plan import NormSite, PairSite, Plan
from .semantics import NormSpec
from .speed import Comparison

PAIR_MEANING = {
    "in_layer": "add -> norm in one layer",
    "cross_layer": "last add -> next layer's norm",
    "final": "last add -> final norm",
    "norm_add": "norm -> add",
}


def numerics(spec: NormSpec | None) -> str:
    """A spec in a few words, e.g. "x*rstd rounded, w, eps 1e-05"."""
    if spec is None:
        return "unknown"
    rounding = {"input": "x*rstd rounded", "weight": "rounded to the weight's type", "none": "one rounding"}
    weight = {"none": "w", "fp32": "1+w", "weight_dtype": "1+w in its type"}[spec.weight_offset]
    words = [rounding[spec.round_before_weight], weight if spec.has_weight else "no weight"]
    words.append("eps of the dtype" if spec.eps is None else f"eps {spec.eps:g}")
    words += [f"width {spec.width}"] * (spec.width is not None) + [f"groups of {spec.group}"] * (spec.group is not None)
    return ", ".join(words)


def numbered(path: str) -> tuple[str, tuple[int, ...]]:
    """("model.layers.#.norm", (3,)) for "model.layers.3.norm"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path), tuple(int(n) for n in re.findall(r"(?<=\.)(\d+)(?=\.|$)", path))


def folded(paths: Iterable[str]) -> str:
    """One row's paths: layer numbers that follow each other become a range."""
    found = list(paths)
    pattern, numbers = numbered(found[0])
    if len(found) == 1 or len(numbers) != 1:
        return found[0] if len(found) == 1 else f"{found[0]} ... ({len(found)})"
    indices = sorted(numbered(p)[1][0] for p in found)
    gapless = indices == list(range(indices[0], indices[-1] + 1))
    shown = f"{indices[0]}-{indices[-1]}" if gapless else f"{indices[0]}..{indices[-1]} ({len(indices)} of them)"
    return pattern.replace("#", f"[{shown}]")


def plan_table(plan: Plan) -> Table:
    """Norms, then pairs; the layers of a stack that are treated alike share a row."""
    table = Table(title=f"{plan.model_class}, backend {plan.backend}", title_justify="left", expand=False)
    table.add_column("site", overflow="fold")
    for name in ("kind", "n", "action", "numerics / why"):
        table.add_column(name, justify="right" if name == "n" else "left", overflow="fold")
    norms: dict[Any, list[NormSite]] = {}
    for site in plan.norms:
        key = (numbered(site.path)[0], site.class_name, site.action, site.spec, site.reason)
        norms.setdefault(key, []).append(site)
    for (_, class_name, action, spec, reason), sites in norms.items():
        why = f"{numerics(spec)}, N={sites[0].hidden_size}" if action == "fuse" else reason
        table.add_row(folded(s.path for s in sites) or "(root)", class_name, str(len(sites)), _coloured(action), why)
    table.add_section()
    pairs: dict[Any, list[PairSite]] = {}
    for pair in plan.pairs:
        why = pair.reason if pair.action == "leave" else pair.source.rsplit("/", 1)[-1]
        pairs.setdefault((pair.kind, numbered(pair.norm)[0], pair.action, why), []).append(pair)
    for (kind, _, action, why), found in pairs.items():
        path = folded(p.norm for p in found) or "(root)"
        table.add_row(path, PAIR_MEANING[kind], str(len(found)), _coloured(action), why)
    return table


def _coloured(action: str) -> str:
    return f"[green]{action}[/]" if action == "fuse" else f"[yellow]{action}[/]"


def speed_table(rows: Iterable[Comparison]) -> Table:
    table = Table(title="tokens per second, median (slowest - fastest round)", title_justify="left")
    for name in ("work", "stock", "patched", "ratio"):
        table.add_column(name, justify="left" if name == "work" else "right")
    for row in rows:
        rates = [f"{r.median:,.0f} ({r.low:,.0f} - {r.high:,.0f})" for r in (row.stock, row.patched)]
        table.add_row(row.work, *rates, f"{row.ratio:.3f}")
    return table


def environment_tables(env: Environment) -> list[Table | Text]:
    versions = Table(title="versions", title_justify="left", show_header=False)
    versions.add_row("python", f"{env.python} on {env.system}")
    for name, version in env.versions.items():
        versions.add_row(name, version or "[dim]not installed[/]")
    devices = Table(title="devices", title_justify="left")
    for name in ("device", "name", "backend", "runs", "why"):
        devices.add_column(name, overflow="fold")
    for device in env.devices:
        name = device.name + (f", capability {device.capability}" if device.capability else "")
        for backend in device.backends:
            runs = "[green]yes[/]" if backend.available else "[yellow]no[/]"
            devices.add_row(device.device, name, backend.name, runs, backend.reason)
        devices.add_row(device.device, name, "auto", device.auto, device.auto_reason)
        devices.add_section()
    places = Table(title="places and settings", title_justify="left", show_header=False)
    places.add_column()
    places.add_column(overflow="fold")
    places.add_row("kernel sources", env.kernels)
    places.add_row("kernel cache", f"{env.cache.directory} ({env.cache.artefacts} kernels, {env.cache.state})")
    vllm = "not installed" if env.vllm.version is None else env.vllm.version
    route = f"; route {env.vllm.route} ({env.vllm.reason})" if env.vllm.version else ""
    places.add_row("vLLM", f"{vllm}; plugin {env.vllm.entry_point or 'not registered'}{route}")
    places.add_row("kernel launches", env.launches)
    for name, value in env.variables.items():
        places.add_row(name, value)
    return [versions, devices, places, *([] if env.engine is None else engine_tables(env.engine))]


def engine_tables(engine: EngineState) -> list[Table | Text]:
    """What was asked and answered, a line each, and one row for each group of norms that share class, columns and what
    serves them."""
    answer = engine.error or f"{engine.reason}; compile mode {engine.compile_mode}"
    shown: list[Table | Text] = [Text(f"vllm serve {' '.join(engine.arguments)}"), Text(answer)]
    if engine.error:
        return shown
    table = Table()
    for name in ("norms", "first", "class", "columns", "served by"):
        table.add_column(name, overflow="fold")
    groups: dict[tuple[str, int, str], list[str]] = {}
    for path, kind, columns, served in engine.norms:
        groups.setdefault((kind, columns, served), []).append(path)
    for (kind, columns, served), paths in groups.items():
        table.add_row(str(len(paths)), escape(paths[0]), kind, str(columns), served)
    return [*shown, table]
