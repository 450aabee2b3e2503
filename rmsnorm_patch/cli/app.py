"""`rmsnorm-patch`: the API on a checkpoint folder, for people and, with --json, for programs.

Nothing here reaches the network, and code that a checkpoint brings runs only with --trust-remote-code. With --json,
stdout holds one JSON document; tables, progress and warnings go to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape

from .. import __version__
from ..errors import RMSNormPatchError
from .folder import check_prompt, read_config
from .options import (
    BackendName,
    BackendOption,
    DeviceOption,
    DtypeOption,
    Exclude,
    Include,
    Json,
    Model,
    NewTokens,
    Prompt,
    Rounds,
    Threads,
    Trust,
    VllmArguments,
    VllmModel,
)
from .output import FAILED, NOTHING_PROVED, STATUSES, Output, described_error, finish, output
from .recordings import check_files, page_written

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_HELP = f"{__doc__}\nExit status: {'; '.join(f'{status} {meaning}' for status, meaning in STATUSES.items())}."
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP, rich_markup_mode=None
)
cache_app = typer.Typer(no_args_is_help=True, help="Look at, check or empty the cache of compiled kernels.")
app.add_typer(cache_app, name="cache")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"rmsnorm_patch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _load(
    out: Output, model: Path, dtype: str, device: str, trust: bool, backend: BackendName, prompt: str | None = None
) -> Checkpoint:
    check_prompt(prompt)
    config = read_config(model)
    with out.progress(None, f"loading {model}"):
        from .checkpoint import load

        loaded = load(model, config, dtype, device, trust, prompt, backend.value)
    for note in loaded.notes:
        out.warn(note)
    return loaded


@app.command()
def env(vllm_model: VllmModel = None, vllm_arg: VllmArguments = None, as_json: Json = False) -> None:
    """Show versions, devices, which backends run on them and why not, the kernel cache and the plugins."""
    with output(as_json) as out:
        from . import environment
        from .tables import environment_tables

        if vllm_arg and not vllm_model:
            raise typer.BadParameter("it belongs to a --vllm-model", param_hint="--vllm-arg")
        report = environment.report([str(vllm_model), *(vllm_arg or ())] if vllm_model else ())
        out.document(report.to_dict())
        if not as_json:
            for table in environment_tables(report):
                out.console.print(table)


@app.command()
def plan(
    model: Model,
    backend: BackendOption = BackendName.auto,
    include: Include = None,
    exclude: Exclude = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show every norm and residual-add that would be fused, and why the others would not. Changes nothing."""
    with output(as_json) as out:
        loaded = _load(out, model, dtype, device, trust_remote_code, backend)
        from .. import api
        from .tables import plan_table

        with out.progress(None, "scanning"):
            planned = api.plan(loaded.model, include=include or (), exclude=exclude or (), backend=backend.value)
        out.document(planned.to_dict())
        if not as_json:
            out.console.print(plan_table(planned, out.console.width))
            for note in planned.notes:
                out.console.print(f"note: {escape(note)}")


@app.command()
def verify(
    model: Model,
    prompt: Prompt = None,
    backend: BackendOption = BackendName.auto,
    include: Include = None,
    exclude: Exclude = None,
    site: Annotated[list[str] | None, typer.Option("--site", help="Judge this norm alone; may be repeated.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the made operands.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Fallbacks and near-ties are failures too.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=0, help="Greedy tokens to compare.")] = 16,
    record: Annotated[Path | None, typer.Option("--record", help="Write logits to this safetensors file.")] = None,
    compare: Annotated[Path | None, typer.Option("--compare", help="Hold logits against this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the proof as a page, red ones too.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Patch the model and prove it against the original: per site, data flow, logits, greedy text, calls that ran."""
    with output(as_json) as out:
        check_files(record, compare, html)
        loaded = _load(out, model, dtype, device, trust_remote_code, backend, prompt)
        from .. import api

        report = api.apply(loaded.model, include=include or (), exclude=exclude or (), backend=backend.value)
        valued = {"--prompt": prompt, "--compare": compare, "--device": None if device == "auto" else device}
        given = [word for name, value in valued.items() if value is not None for word in (name, str(value))]
        given += [word for path in include or () for word in ("--include", path)]
        given += [word for path in exclude or () for word in ("--exclude", path)]
        given += ["--strict"] * strict + ["--trust-remote-code"] * trust_remote_code
        with out.progress(None, "proving") as step, page_written(html, report.plan) as written:
            proof = written.proof = api.verify(
                loaded.model,
                loaded.inputs(prompt, out.warn),
                sites=site or None,
                seed=seed,
                strict=strict,
                greedy_tokens=max_new_tokens,
                record=record,
                compare=compare,
                source=str(model),
                arguments=[*given, "--max-new-tokens", str(max_new_tokens)],
                progress=step,
            )
        out.document(proof.to_dict())
        if not as_json:
            out.console.print(proof.explain(), markup=False, highlight=False)


@app.command()
def generate(
    model: Model,
    prompt: Prompt = None,
    max_new_tokens: NewTokens = 64,
    stock: Annotated[bool, typer.Option("--stock", help="Show the text of the unpatched model.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run both; status 1 if tokens differ.")] = False,
    backend: BackendOption = BackendName.auto,
    include: Include = None,
    exclude: Exclude = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt greedily with the patched model."""
    with output(as_json) as out:
        loaded = _load(out, model, dtype, device, trust_remote_code, backend, prompt)
        from .. import api
        from . import speed

        loaded.check_generates()
        outputs = {}
        given = loaded.inputs(prompt, out.warn)
        with out.progress(None, "generating"):
            if stock or compare:
                outputs["stock"] = speed.generate(loaded.model, given, max_new_tokens)
            if not stock or compare:
                api.apply(loaded.model, include=include or (), exclude=exclude or (), backend=backend.value)
                outputs["patched"] = speed.generate(loaded.model, given, max_new_tokens)
        tokens, rate = outputs["stock" if stock else "patched"]
        equal = bool((outputs["stock"][0] == outputs["patched"][0]).all()) if compare else None
        text = loaded.decode(tokens[0])
        answer = {"tokens": tokens[0].tolist(), "text": text, "tokens_per_second": rate, "patched": not stock}
        out.document({**answer, "equal_to_stock": equal})
        if not as_json:
            out.console.print(text or " ".join(map(str, tokens[0].tolist())), markup=False, highlight=False)
            other = "patched" if stock else "stock"
            compared = "" if equal is None else f", equal to {other}: {'yes' if equal else 'NO'}"
            out.progress_console.print(f"{rate:,.1f} tokens/s{compared}", style="dim")
        if equal is False:
            raise typer.Exit(FAILED)


@app.command()
def bench(
    model: Model,
    prompt: Prompt = None,
    max_new_tokens: NewTokens = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at once.")] = 1,
    rounds: Rounds = 5,
    threads: Threads = None,
    backend: BackendOption = BackendName.auto,
    include: Include = None,
    exclude: Exclude = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time decode and prefill, stock and patched in alternating rounds."""
    with output(as_json) as out:
        loaded = _load(out, model, dtype, device, trust_remote_code, backend, prompt)
        from . import speed
        from .tables import speed_table

        one, generates = loaded.inputs(prompt, out.warn), loaded.generates
        given = speed.repeated(one, batch_size)
        used = speed.chosen_threads(loaded.model, given, generates, threads)
        with out.progress(2 * (rounds + 1), "timing") as step, used as chosen:
            patch = speed.Patch(backend.value, tuple(include or ()), tuple(exclude or ()))
            rows = speed.compare(loaded.model, given, generates, max_new_tokens, rounds, patch, step)
        note = speed.CPU_NOTE if loaded.device.type == "cpu" else ""
        answer: dict[str, Any] = {"device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch.")}
        answer.update(batch_size=batch_size, threads=chosen, note=note)
        answer["prompt_tokens"] = one["input_ids"].shape[1] if "input_ids" in one else 0
        out.document({**answer, "results": [row.to_dict() for row in rows]})
        if not as_json:
            out.console.print(speed_table(rows))
            for text in (note, speed.NOISE_NOTE if any(row.verdict == "too noisy" for row in rows) else ""):
                out.console.print(text, style="dim") if text else None


@app.command("bench-kernels")
def bench_kernels(
    suite: Annotated[list[str] | None, typer.Option("--suite", help="A named set of cases; may be repeated.")] = None,
    op: Annotated[str, typer.Option("--op", help="fused_add_rms_norm, rms_norm, rms_norm_pair and others.")] = "",
    mode: Annotated[str, typer.Option("--mode", help="cold, hot, chain or host.")] = "cold",
    dtype: Annotated[str, typer.Option("--row-dtype", help="bf16, fp16 or fp32.")] = "bf16",
    variant: Annotated[str, typer.Option("--variant", help="Other numerics, for our kernels alone.")] = "",
    m: Annotated[list[int] | None, typer.Option("--m", min=1, help="Rows; may be repeated.")] = None,
    n: Annotated[list[int] | None, typer.Option("--n", min=1, help="Columns; may be repeated.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Time this provider alone; may be repeated.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="[name=]module:function of one more; may be repeated.")
    ] = None,
    replays: Annotated[int, typer.Option("--replays", min=5, help="Of each captured graph.")] = 20,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="Begin no case after this long.")] = 3600,
    warm_jobs: Annotated[int, typer.Option("--warm-jobs", min=0, help="Processes that compile ahead.")] = 0,
    warm_slice: Annotated[str, typer.Option("--warm-slice", hidden=True)] = "",
    rows: Annotated[Path | None, typer.Option("--rows", help="Write the rows to this file, after every case.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the times into this SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Time our norm kernels beside installed peers and a copy of the same bytes, on this machine's GPU."""
    with output(as_json) as out:
        from .kernel_bench import Request, run

        shapes = {"op": op, "mode": mode, "dtype": dtype, "variant": variant, "m": m, "n": n}
        request = Request(tuple(suite or ()), shapes, tuple(only or ()), tuple(provider or ()), replays, seconds)
        run(out, request, warm_jobs, warm_slice, rows, plot)


@app.command()
def demo(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Checkpoint folders.")],
    prompt: Prompt = None,
    max_new_tokens: NewTokens = 96,
    rounds: Rounds = 3,
    backend: BackendOption = BackendName.auto,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Plan, patch, prove, compare text and speed, and undo, on one checkpoint after the other."""
    with output(as_json) as out:
        check_prompt(prompt)
        refused = {folder: error for folder in models if (error := _refusal(out, folder)) is not None}
        statuses, documents = [], []
        with contextlib.ExitStack() as stack:
            step = stack.enter_context(out.progress(len(models), "demo")) if len(models) > 1 else None
            for folder in models:
                status, document = refused.get(folder) or _story(
                    out, folder, prompt, max_new_tokens, dtype, device, backend.value, rounds
                )
                statuses.append(status)
                documents.append(document)
                if step is not None:
                    step()
        out.document({"passed": not any(statuses), "checkpoints": documents})
        for status, document in zip(statuses, documents, strict=True):
            verdict = "[red]FAILED[/]" if status else "[green]PASSED[/]"
            out.console.print(f"{verdict} {escape(document['checkpoint'])}")
        if any(statuses):
            raise typer.Exit(FAILED if FAILED in statuses else next(filter(None, statuses)))


def _refusal(out: Output, folder: Path) -> tuple[int, dict[str, Any]] | None:
    """What a folder's own files say against it, before the work on the others."""
    try:
        read_config(folder)
    except RMSNormPatchError as error:
        return _failed(out, folder, error)
    return None


def _failed(out: Output, folder: Path, error: RMSNormPatchError) -> tuple[int, dict[str, Any]]:
    status, described = described_error(error)
    out.progress_console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return status, {"checkpoint": folder.resolve().name, "passed": False, "error": described, "exit_status": status}


def _story(
    out: Output, folder: Path, prompt: str | None, new_tokens: int, dtype: str, device: str, backend: Any, rounds: int
) -> tuple[int, dict[str, Any]]:
    """(exit status, document) of one checkpoint; what is wrong with one leaves the others' documents alone."""
    try:
        config = read_config(folder)
        from .checkpoint import has_tokenizer, load
        from .demo import PROMPT, tell

        text = PROMPT if prompt is None and has_tokenizer(folder) else prompt
        loaded = load(folder, config, dtype, device, prompt=text, backend=backend)
        story = tell(loaded, loaded.inputs(text, out.warn), text or "", new_tokens, out.console, backend, rounds)
    except RMSNormPatchError as error:
        return _failed(out, folder, error)
    if story.passed:
        return 0, story.to_dict()
    idle = story.proof.verdict == "nothing proved" and story.same_text and story.restored
    return NOTHING_PROVED if idle else FAILED, story.to_dict()


@cache_app.command("show")
def cache_show(as_json: Json = False) -> None:
    """List the compiled kernels on disk."""
    with output(as_json) as out:
        from ..backends.cuda import cache

        entries = cache.entries()
        listed = [{"key": e.key, "size_bytes": e.size, "state": e.state, "meta": e.meta} for e in entries]
        out.document({"directory": str(cache.directory()), "kernels": listed})
        if not as_json:
            out.console.print(f"{cache.directory()}: {len(entries)} compiled")
            for entry in entries:
                out.console.print(f"  {entry.key}  {entry.size:>8} B  {entry.state}  {entry.meta}", markup=False)


@cache_app.command("verify")
def cache_verify(as_json: Json = False) -> None:
    """Check every digest; damaged kernels go into quarantine and the exit status is 1."""
    with output(as_json) as out:
        import warnings

        from ..backends.cuda import cache

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each damaged kernel is listed below
            damaged = cache.verify()
        out.document({"damaged": [{"key": e.key, "state": e.state} for e in damaged]})
        for entry in damaged:
            out.console.print(f"damaged: {entry.path} ({entry.state})", markup=False)
        if damaged:
            raise typer.Exit(FAILED)
        if not as_json:
            out.console.print("every kernel is as it was written")


@cache_app.command("clear")
def cache_clear(as_json: Json = False) -> None:
    """Remove every compiled kernel; they are built again when needed."""
    with output(as_json) as out:
        from ..backends.cuda import cache

        removed = cache.clear()
        out.document({"removed": removed})
        if not as_json:
            out.console.print(f"{removed} removed from {cache.directory()}")


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; `args` default to the command line's. Ends in SystemExit with the status."""
    # Set before transformers is imported, which reads them once. Nothing here may fetch a checkpoint.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    words = sys.argv[1:] if args is None else list(args)

    def run() -> None:
        command = typer.main.get_command(app)
        with command.make_context("rmsnorm-patch", list(words)) as context:
            command.invoke(context)

    sys.exit(finish(run, "--json" in words))
