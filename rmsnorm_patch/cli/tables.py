"""Plans, proofs and measurements as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..page import wrapped
from ..scan.plan import Plan
from .environment import EngineState, Environment
from .speed import Comparison


def plan_table(plan: Plan, width: int) -> Table:
    """Norms, then pairs; the layers of a stack that are treated alike share a row. width: of the terminal; each row's
    site and reason stand on lines of their own, so that no word is parted that fits a line."""
    table = Table(title=f"{plan.model_class}, backend {plan.backend}", title_justify="left", expand=False)
    table.add_column("action")
    table.add_column("n", justify="right")
    table.add_column("site, kind, numerics / why", no_wrap=True)
    digits = len(str(max((group.count for group in plan.norm_groups()), default=0)))
    room = width - len("| action | ") - digits - len(" |  |")
    for groups in (plan.norm_groups(), plan.pair_groups()):
        table.add_section()
        for group in groups:
            lines = wrapped(group.where, room, "  ") + wrapped(f"  {group.what}: {group.why}", room, "  ")
            table.add_row(_coloured(group.action), str(group.count), Text("\n".join(lines)))
    return table


def _coloured(action: str) -> str:
    return f"[green]{action}[/]" if action == "fuse" else f"[yellow]{action}[/]"


def speed_table(rows: Iterable[Comparison]) -> Table:
    table = Table(title="tokens per second, median (slowest - fastest round)", title_justify="left")
    for name in ("work", "stock", "patched", "ratio"):
        table.add_column(name, justify="left" if name == "work" else "right")
    for row in rows:
        rates = [f"{r.median:,.0f} ({r.low:,.0f} - {r.high:,.0f})" for r in (row.stock, row.patched)]
        table.add_row(row.work, *rates, _ratio(row))
    return table


def _ratio(row: Comparison) -> str:
    if row.verdict == "too noisy":
        return "[yellow]too noisy[/]"
    return f"{row.ratio:.3f}" + (f" ({row.verdict})" if row.verdict in ("equal", "one round") else "")


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
    route = f"; route {env.vllm.route} ({env.vllm.reason}); numerics {env.vllm.numerics}" if env.vllm.version else ""
    places.add_row("vLLM", f"{vllm}; plugin {env.vllm.entry_point or 'not registered'}{route}")
    places.add_row("kernel launches", env.launches)
    for name, value in env.variables.items():
        fault = env.variable_faults.get(name, "")
        places.add_row(name, escape(value) + (f"\n[yellow]{escape(fault)}[/]" if fault else ""))
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
