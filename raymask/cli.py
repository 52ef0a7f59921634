"""What can be typed? Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raymask.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from raymask.core.records import Result
    from raymask.core.spec import Spec

app = typer.Typer(
    help="Find the best sparse version of a Transformer: randomized mask search on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

SpecFile = Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="A YAML spec; without one, the quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. candidates.count=16.")
]
RunPlace = Annotated[
    str | None,
    typer.Option(help="Run directory: a path, or a URI such as s3://bucket/run; runs/<spec's name> when not given."),
]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster: auto, HOST or HOST:PORT. Without it, a private Ray on this machine.")
]
InProcess = Annotated[bool, typer.Option("--in-process", help="One worker in this process, without Ray.")]
JobsAddress = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, http://HOST:8265. Else $RAY_API_SERVER_ADDRESS, or this machine's."),
]


class Scheduler(StrEnum):
    none = "none"
    asha = "asha"


class Algorithm(StrEnum):
    random = "random"
    optuna = "optuna"


class Values(StrEnum):
    exact = "exact"
    fp16 = "fp16"


Job = Annotated[str, typer.Argument(metavar="ID", help="A job, as `raymask jobs` names it.")]


@app.command(epilog="Example: raymask search spec.yaml --set candidates.count=16 --run runs/many")
def search(
    spec: SpecFile = None,
    overrides: Overrides = None,
    run: RunPlace = None,
    address: Address = None,
    in_process: InProcess = False,
) -> None:
    """Prune a model: search, fine-tune, export. The same command again continues.

    [bold]raymask search[/bold] alone runs the quickstart: a small task and a tiny BERT, made on the spot.
    """
    asked, name = read(spec, overrides)
    folder = run or f"runs/{name}"
    console = make_console()
    result = searched(console, asked, folder, address, in_process)
    from raymask.report.terminal import show_result

    show_result(console, result)
    following = [
        f"open {folder}/report.html, or raymask show {folder}",
        f"raymask bench {folder}: how fast it is on this machine",
        f"raymask export {folder} --to sparse: the model in little room",
    ]
    if spec is None:
        following.append("raymask search SPEC: your own model and task; the repository's jobs/own-data.yaml is one")
    console.print("\nNext: " + "\n      ".join(following), highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: raymask audit jobs/audit.yaml --set task=glue/rte")
def audit(
    spec: SpecFile = None,
    overrides: Overrides = None,
    run: Annotated[str | None, typer.Option(help="Run directory; runs/<spec's name>-audit when not given.")] = None,
    address: Address = None,
    in_process: InProcess = False,
) -> None:
    """Fine-tune all masks of every level, and say whether the early evaluation picks the better ones.

    As long as a search that keeps every mask: make the spec small. The same command again continues.
    """
    asked, name = read(spec, overrides)
    console = make_console()
    from raymask.audit import audited, show_audit

    result = searched(console, audited(asked), run or f"runs/{name}-audit", address, in_process)
    show_audit(console, result, asked)


def searched(console: Console, asked: Spec, folder: str, address: str | None, in_process: bool) -> Result:
    """Search with progress on the console."""
    from raymask.storage import require_no_secret

    require_no_secret(folder)
    console.print(f"Run directory: {folder}; report.html there shows how far it is", highlight=False, markup=False)
    from raymask.driver.search import search as run_search
    from raymask.report.terminal import watching

    with stoppable(), watching(console, asked) as watch:
        return run_search(asked, folder, watch, address=address, in_process=in_process)


@app.command(epilog="Example: raymask tune spec.yaml space.yaml --num-samples 16 --scheduler asha")
def tune(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML spec.")],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="A YAML file: which of its keys vary, and how.")],
    overrides: Overrides = None,
    samples: Annotated[
        int | None,
        typer.Option("--num-samples", min=1, help="How many trials, 8; with grids, how often they are gone through."),
    ] = None,
    scheduler: Annotated[
        Scheduler, typer.Option(help="asha: at level 1, 2, 4, 8, only the better half of the trials goes on.")
    ] = Scheduler.none,
    algorithm: Annotated[
        Algorithm, typer.Option(help="Who chooses the trials: chance, or Optuna (pip install 'raymask\\[optuna]').")
    ] = Algorithm.random,
    run: Annotated[
        str | None,
        typer.Option(help="Folder of the trials: a path, or a URI; runs/<spec's name>-<space's name> when not given."),
    ] = None,
    address: Address = None,
) -> None:
    """Find good settings for a spec: a search each, by Ray Tune, judged on select. The same command again continues.

    SPACE says for example [bold]candidates.exponent: {uniform: \\[2, 10]}[/bold]; also loguniform, randint, choice and
    grid. A search takes one worker, or workers.count.
    """
    folder = run or f"runs/{spec.stem}-{space.stem}"
    console = make_console()
    console.print(f"Folder of the trials: {folder}", highlight=False, markup=False)
    from raymask.tune import run_tuning

    with stoppable():
        run_tuning(
            console,
            spec,
            space,
            overrides or (),
            folder,
            samples=samples,
            scheduler=scheduler.value,
            algorithm=algorithm.value,
            address=address,
        )


@app.command(epilog="Example: raymask check spec.yaml --address auto")
def check(spec: SpecFile = None, overrides: Overrides = None, address: Address = None) -> None:
    """Say what a search would do, without doing it: is all readable, what is pruned, what it costs."""
    asked, _ = read(spec, overrides)
    from raymask.check import show_check

    show_check(make_console(), asked, address)


@app.command(epilog="Example: raymask show s3://bucket/runs/mrpc")
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory: a path or a URI.")],
    as_json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """Print a finished or running search: what its report.html shows, in letters."""
    from raymask.report.show import show_run

    show_run(make_console(), run, as_json)


@app.command(epilog="Example: raymask compare runs/spec runs/many --html compare.html")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories: paths or URIs.")],
    html: Annotated[Path | None, typer.Option(help="Also as a page, with plots, in this file.")] = None,
) -> None:
    """Print searches side by side: what they found, what it cost, and what was asked differently."""
    from raymask.report.show import show_comparison

    show_comparison(make_console(), runs, html)


@app.command("eval", epilog="Example: raymask eval runs/spec/export --task runs/spec/spec.yaml")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, or a folder: a checkpoint, a run's export.")],
    task: Annotated[str, typer.Option(metavar="TASK", help="A task's name (glue/mrpc), or a YAML spec, as of a run.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """Measure any checkpoint as a search's report does: on all rows of report, with 95 % intervals.

    For the figures of a run's own table: [bold]raymask eval RUN/export --task RUN/spec.yaml[/bold]
    """
    from raymask.evaluate import show_evaluation

    show_evaluation(make_console(), model, task, overrides or (), as_json)


@app.command(epilog="Example: raymask export runs/spec --to sparse --values fp16")
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory of a finished search: a path or a URI.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf, sparse, onnx or masks")],
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A local folder; export-FORMAT in the run when not given.")
    ] = None,
    values: Annotated[Values | None, typer.Option(help="sparse: weights as they are (the default), or fp16.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="onnx: weights in int8 as well, and what it costs.")] = False,
    shrink: Annotated[bool, typer.Option("--shrink", help="onnx: without dead neurons and attention heads.")] = False,
) -> None:
    """Write what a search found in another form, and check it against the original."""
    from raymask.export.formats import export_run

    options = {"values": values and values.value, "int8": int8, "shrink": shrink}
    given = {name: value for name, value in options.items() if value}
    console = make_console()
    for line in export_run(run, to, out, **given):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: raymask bench runs/spec --batch 1 --batch 8 --length 64")
def bench(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory of a finished search: a path or a URI.")],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows at once, 1 and 16; can be repeated.")] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row, 128 or as many as the model takes.")
    ] = None,
) -> None:
    """Say how fast what was found is on this machine, in all forms and by all runtimes that are installed.

    Threads are those of OMP_NUM_THREADS, or as many as there are cores.
    """
    from raymask.bench import show_bench

    show_bench(make_console(), run, batch or (), length)


@app.command(epilog="Example: raymask submit spec.yaml --run s3://bucket/runs/mrpc --follow")
def submit(
    spec: SpecFile = None,
    overrides: Overrides = None,
    address: JobsAddress = None,
    run: Annotated[
        str | None,
        typer.Option(help="Run directory: a URI, or a path that the cluster's head has; ~/raymask-runs/<spec's name>."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's log until it ends.")] = False,
) -> None:
    """Run a search as a job on a Ray cluster. The same spec and --run continue what was stopped or failed.

    Files that the spec names by relative paths travel with the job; absolute paths are the cluster's.
    """
    from raymask import submit as jobs

    console, source = make_console(), spec_path(spec)
    job = jobs.submit(console, source, source.stem, overrides or (), address, run)
    if follow:
        raise typer.Exit(jobs.show_logs(console, job, address, follow=True))
    console.print(f"\nNext: raymask status {job}\n      raymask logs {job} --follow", highlight=False, markup=False)


@app.command(epilog="Example: raymask jobs --address http://head:8265")
def jobs(address: JobsAddress = None) -> None:
    """List the searches that a Ray cluster knows."""
    from raymask.submit import show_jobs

    show_jobs(make_console(), address)


@app.command(epilog="Example: raymask status raysubmit_qPfzG5Y9BMsnqpRw")
def status(job: Job, address: JobsAddress = None) -> None:
    """Say how far a job's search is."""
    from raymask.submit import show_status

    show_status(make_console(), job, address)


@app.command(epilog="Example: raymask logs raysubmit_qPfzG5Y9BMsnqpRw --follow")
def logs(
    job: Job,
    address: JobsAddress = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
) -> None:
    """Print a job's log."""
    from raymask.submit import show_logs

    raise typer.Exit(show_logs(make_console(), job, address, follow))


@app.command(epilog="Example: raymask stop raysubmit_qPfzG5Y9BMsnqpRw")
def stop(job: Job, address: JobsAddress = None) -> None:
    """End a job. What it has finished stays in its run directory."""
    from raymask import submit as jobs

    jobs.stop(make_console(), job, address)


@app.command(epilog="Example: raymask fetch raysubmit_qPfzG5Y9BMsnqpRw here")
def fetch(
    job: Job,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A local folder.")],
    address: JobsAddress = None,
) -> None:
    """Copy a job's report, export and journal to a local folder."""
    from raymask import submit as jobs

    jobs.fetch(make_console(), job, folder, address)


def spec_path(path: Path | None) -> Path:
    """A spec's file, or the quickstart's."""
    return Path(str(files("raymask") / "quickstart.yaml")) if path is None else path


def read(path: Path | None, overrides: list[str] | None) -> tuple[Spec, str]:
    """The spec, or the quickstart's, and the name that its run gets."""
    from raymask.config import load_spec

    source = spec_path(path)
    return load_spec(source, overrides or ()), source.stem


@contextmanager
def stoppable() -> Iterator[None]:
    """What SIGTERM, by which a job is stopped, and Ctrl-C end with a word and exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("raymask: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


def make_console() -> Console:
    """Where output goes: tables need not wrap in a log."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def main() -> None:
    """Run the command line: exit code 0 when done, 2 for a mistake that the user can mend, 130 after Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what it tries again is not worth a line each
    try:
        app()
    except UserError as error:
        print(f"raymask: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output, `head` for one, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except PermissionError as error:
        print(f"raymask: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
