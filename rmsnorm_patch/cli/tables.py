"""Plans, proofs and measurements as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..page import wrapped
from ..scan.plan import Plan
from .environment import EngineState, Environment
from .speed import SpeedComparison


def plan_table(plan: Plan, width: int) -> Table:
    """Norms, then pairs; the layers of a stack that are treated alike share a row. width: of the terminal; each row's
    site and reason stand on lines of their own, so that no word is parted that fits a line."""
    table = Table(title=f"{plan.model_class}, backend {plan.backend}", title_justify="left", expand=False)
    table.add_column("action")
    table.add_column("n", justify="right")
    table.add_column("site, kind, numerics / why", no_wrap=True)
    digits = len(str(max((group.count for group in plan.norm_groups()), default=0)))
    room = width - len("| action | ") - digits - len(" |  |")
    for groups in (plan.norm_groups(), plan.pair_groups(), plan.query_key_groups()):
        table.add_section()
        for group in groups:
            lines = wrapped(group.where, room, "  ") + wrapped(f"  {group.what}: {group.why}", room, "  ")
            table.add_row(_coloured(group.action), str(group.count), Text("\n".join(lines)))
    return table


def _coloured(action: str) -> str:
    return f"[green]{action}[/]" if action == "fuse" else f"[yellow]{action}[/]"


def speed_table(rows: Iterable[SpeedComparison]) -> Table:
    table = Table(title="tokens per second, median (slowest - fastest round)", title_justify="left")
    for name in ("work", "stock", "patched", "ratio"):
        table.add_column(name, justify="left" if name == "work" else "right")
    for row in rows:
        rates = [f"{r.median:,.0f} ({r.low:,.0f} - {r.high:,.0f})" for r in (row.stock, row.patched)]
        table.add_row(row.work, *rates, _ratio(row))
    return table


def _ratio(row: SpeedComparison) -> str:
    if row.verdict == "too noisy":
        return "[yellow]too noisy[/]"
    return f"{row.ratio:.3f}" + (f" ({row.verdict})" if row.verdict in ("equal", "one round") else "")


def environment_tables(env: Environment) -> list[Table | Text]:
    """One screen: what this machine gets, then why."""
    gets = _section("what this machine gets", env.outlook)
    why = []
    for device in env.devices:
        name = f"{device.device}, {device.name}" + (f" ({device.capability})" if device.capability else "")
        why.append((name, f"auto is {device.auto}: {device.auto_reason}"))
        why += [("", f"no {b.name}: {b.reason}") for b in device.backends if not b.available]
        why += [("", f"{b.name}: {b.reason}") for b in device.backends if b.available and b.name == "cuda"]
    versions = [f"{name} {version}" for name, version in env.versions.items() if version]
    missing = [name for name, version in env.versions.items() if not version]
    places = [
        ("system", f"python {env.python} on {env.system}"),
        ("versions", ", ".join(versions)),
        *([("not installed", ", ".join(missing))] if missing else []),
        ("kernel sources", env.kernels),
        ("kernel cache", f"{env.cache.directory} ({env.cache.artefacts} compiled, {env.cache.state})"),
        ("kernel launches", env.launches),
        ("vLLM's plugin", _plugin(env)),
        ("SGLang's plugin", env.sglang.entry_point or "not registered"),
    ]
    table = _section("places and settings", places)
    for name, value in env.variables.items():
        fault = env.variable_faults.get(name, "")
        table.add_row(name, escape(value) + (f"\n[yellow]{escape(fault)}[/]" if fault else ""))
    shown = [gets, _section("devices", why), table]
    return [*shown, *([] if env.engine is None else engine_tables(env.engine))]


def _plugin(env: Environment) -> str:
    route = f"; route {env.vllm.route} ({env.vllm.reason}); numerics {env.vllm.numerics}" if env.vllm.version else ""
    return f"{env.vllm.entry_point or 'not registered'}{route}"


def _section(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(escape(name), escape(text))
    return table


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
