"""Write the tables of docs/reference.md: commands, options, exit statuses, errors and variables, from the program.

    python scripts/reference.py

The words between the tables are written by hand. `--help` of a command says the same of its options.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchlib.pages import table
from typer.main import get_command

from rmsnorm_patch import errors
from rmsnorm_patch.cli.app import app
from rmsnorm_patch.cli.environment import VARIABLES
from rmsnorm_patch.cli.output import STATUSES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
MORE = {"verify": "proof.md", "bench-kernels": "benchmarks.md"}
"""Pages on what a command does."""


def commands() -> dict[str, Any]:
    """Every command by its full name, "cache show" for example."""
    found, groups = {}, [("", get_command(app))]
    while groups:
        prefix, group = groups.pop()
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                groups.append((f"{name} ", command))
            else:
                found[prefix + name] = command
    return found


def options(command: Any) -> dict[str, str]:
    """Option -> its help; hidden ones are left out."""
    shown = [one for one in command.params if one.opts[0].startswith("--") and not getattr(one, "hidden", False)]
    return {one.opts[0]: sentence(one.help) for one in shown}


def taken_by() -> dict[str, str]:
    """Option -> which commands take it, for those that all of a kind take."""
    having = {name: set(options(command)) for name, command in commands().items()}
    on_models = {name for name, names in having.items() if "--backend" in names}
    kinds = {"all": set(having), "all on a model": on_models, "all on a model but `demo`": on_models - {"demo"}}
    every = dict.fromkeys(option for names in having.values() for option in sorted(names))
    found = {}
    for option in every:
        taking = {name for name, names in having.items() if option in names}
        kind = next((kind for kind, names in kinds.items() if names == taking), None)
        if kind is not None:
            found[option] = kind
    return found


def sentence(text: str) -> str:
    """Without its capital and its stop, as a cell has it."""
    first = text.strip().partition("\n\n")[0].rstrip(".")
    word = first.split()[0]
    return " ".join((first if len(word) > 1 and word.isupper() else first[0].lower() + first[1:]).split())


def commands_table() -> str:
    shared, rows = taken_by(), []
    for name, command in commands().items():
        given = {parameter.name: parameter for parameter in command.params}
        model = " MODEL" if "model" in given else " MODEL..." if "models" in given else ""
        more = f" ([more]({MORE[name]}))" if name in MORE else ""
        own = " ".join(option for option in options(command) if option not in shared)
        rows.append([f"`rmsnorm-patch {name}{model}`", sentence(command.help) + more, f"`{own}`" if own else ""])
    return table(["command", "does", "its own options"], rows)


def options_table() -> str:
    said = {option: text for command in commands().values() for option, text in options(command).items()}
    return table(["option", "commands", "meaning"], [[f"`{o}`", kind, said[o]] for o, kind in taken_by().items()])


def errors_table() -> str:
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
    return table(["error", "when"], [[f"`{kind.__name__}`", sentence(kind.__doc__ or "")] for kind in kinds])


def variables_table() -> str:
    rows = [
        [f"`{name}`", one.meaning + (f" ([more]({one.page}))" if one.page else "")] for name, one in VARIABLES.items()
    ]
    return table(["variable", "meaning"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands_table,
    "options": options_table,
    "exit statuses": lambda: table(["exit status", "meaning"], [[status, text] for status, text in STATUSES.items()]),
    "errors": errors_table,
    "variables": variables_table,
}


def page(text: str) -> str:
    """`text` with its tables written anew."""
    for name, make in TABLES.items():
        mark = f"<!-- {name}: written by scripts/reference.py -->"
        pattern = rf"{re.escape(mark)}\n\n.*?\n<!-- end -->"
        if len(re.findall(pattern, text, flags=re.DOTALL)) != 1:
            raise SystemExit(f"reference: {PAGE.name} has no place for the table of {name}")
        new = f"{mark}\n\n{make()}\n<!-- end -->"
        text = re.sub(pattern, lambda _, new=new: new, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
