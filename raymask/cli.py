"""The command line. Heavy imports happen only when a command needs them."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from raymask.core.errors import UserError, describe
from raymask.report.output import StandardOutput, say_on_stderr, standard_output, where_traceback
from raymask.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from raymask.core.records import Result
    from raymask.core.spec import Spec

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

SpecFile = Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="A YAML spec; without one, the quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. candidates.count=16.")
]
RunPlace = Annotated[
    str | None,
    typer.Option(help="Run directory: a path, or a URI such as s3://bucket/run. Default: runs/<spec's name>."),
]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster: auto, HOST or HOST:PORT. Default: a private Ray on this machine.")
]
InProcess = Annotated[bool, typer.Option("--in-process", help="Use one worker in this process, without Ray.")]
RayDir = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Where a private Ray keeps its temporary files: a short path. Default: $RAYMASK_RAY_DIR, or /tmp.",
    ),
]
JobsAddress = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, http://HOST:8265. Default: $RAY_API_SERVER_ADDRESS, or this machine's."
    ),
]


class Scheduler(StrEnum):
    """Choices of `raymask tune --scheduler`."""

    none = "none"
    asha = "asha"


class Algorithm(StrEnum):
    """Choices of `raymask tune --algorithm`."""

    random = "random"
    optuna = "optuna"


class Values(StrEnum):
    """Choices of `raymask export --values`."""

    exact = "exact"
    fp16 = "fp16"


INTERRUPTED = 130  # exit code after Ctrl-C
STOPPED = "stopped. Run the same command again to continue"

Job = Annotated[str, typer.Argument(metavar="ID", help="A job's id, as `raymask jobs` lists it.")]


def print_versions(is_given: bool) -> None:
    """Print the versions of raymask and of what it builds on, and end."""
    if is_given:
        print(f"raymask {__version__}")
        for package, name in (("ray", "Ray"), ("torch", "torch"), ("transformers", "transformers")):
            print(f"{name} {version(package)}")
        print(f"Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def raymask(
    _: Annotated[
        bool, typer.Option("--version", callback=print_versions, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Find the best sparse version of a Transformer: randomized mask search on Ray."""


@app.command(epilog="Example: raymask search spec.yaml --set candidates.count=16 --run runs/many")
def search(
    spec: SpecFile = None,
    overrides: Overrides = None,
    run: RunPlace = None,
    address: Address = None,
    in_process: InProcess = False,
    ray_dir: RayDir = None,
) -> None:
    """Prune a model: search, fine-tune, export. Run the same command again to continue.

    [bold]raymask search[/bold] alone runs the quickstart: a small generated task and a tiny BERT.
    """
    search_spec, name = read(spec, overrides)
    folder = run or f"runs/{name}"
    console = make_console(required=False)
    result = run_with_progress(console, search_spec, folder, address, in_process, ray_dir)
    from raymask.report.console import show_result

    show_result(console, result)
    place = shlex.quote(folder)  # to be pasted into a shell, blanks and all
    next_steps = [
        f"open {place}/report.html, or raymask show {place}",
        f"raymask bench {place}: how fast it is on this machine",
        f"raymask export {place} --to sparse: the model in compact form",
    ]
    if spec is None:
        next_steps.append("raymask search SPEC: your own model and task; see jobs/own-data.yaml in the repository")
    console.print("\nNext: " + "\n      ".join(next_steps), highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: raymask audit jobs/audit.yaml --set task=glue/rte")
def audit(
    spec: SpecFile = None,
    overrides: Overrides = None,
    run: Annotated[str | None, typer.Option(help="Run directory. Default: runs/<spec's name>-audit.")] = None,
    address: Address = None,
    in_process: InProcess = False,
    ray_dir: RayDir = None,
) -> None:
    """Fine-tune all masks of every level, and show whether early evaluation scores predict the results.

    An audit fine-tunes every mask, so use a small spec. Run the same command again to continue.
    """
    user_spec, name = read(spec, overrides)
    folder = run or f"runs/{name}-audit"
    console = make_console(required=False)
    from raymask.commands.audit import audit_spec, show_audit

    result = run_with_progress(console, audit_spec(user_spec), folder, address, in_process, ray_dir)
    show_audit(console, result, user_spec)


def run_with_progress(
    console: Console, spec: Spec, folder: str, address: str | None, in_process: bool, ray_dir: str | None
) -> Result:
    """Run a search with progress on the console.

    Args:
        console: Where the output goes.
        spec: The search's spec.
        folder: The run directory, a path or a URI.
        address: A Ray cluster; None: a private Ray.
        in_process: Use one worker in this process, without Ray.
        ray_dir: Where a private Ray keeps its temporary files.

    Raises:
        UserError: For whatever the user can fix.
    """
    from raymask.runs.open import require_no_secret

    require_no_secret(folder)
    console.print(f"Run directory: {folder}; its report.html shows the progress", highlight=False, markup=False)
    from raymask.driver.search import search as run_search
    from raymask.report.console import progress_callback

    if ray_dir is not None:
        os.environ["RAYMASK_RAY_DIR"] = ray_dir
    with handle_interrupts(), progress_callback(console, spec) as callback:
        return run_search(spec, folder, [callback], address=address, in_process=in_process)


@app.command(epilog="Example: raymask tune spec.yaml space.yaml --num-samples 16 --scheduler asha")
def tune(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML spec.")],
    space: Annotated[
        Path, typer.Argument(metavar="SPACE", help="A YAML file that says which keys of the spec vary, and how.")
    ],
    overrides: Overrides = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples", min=1, help="Number of trials, default 8; with grids, how often each grid is repeated."
        ),
    ] = None,
    scheduler: Annotated[
        Scheduler, typer.Option(help="asha: after levels 1, 2, 4 and 8 only the better half of the trials continues.")
    ] = Scheduler.none,
    algorithm: Annotated[
        Algorithm,
        typer.Option(help="How trials are chosen: at random, or by Optuna (pip install 'raymask\\[optuna]')."),
    ] = Algorithm.random,
    run: Annotated[
        str | None,
        typer.Option(help="Folder of the trials: a path or a URI. Default: runs/<spec's name>-<space's name>."),
    ] = None,
    address: Address = None,
) -> None:
    """Tune a spec's settings with Ray Tune. Each trial is a search, scored on validation.

    Run the same command again to continue. An example of SPACE: [bold]candidates.exponent: {uniform: \\[2, 10]}[/bold];
    loguniform, randint, choice and grid work too. Each search uses one worker, or workers.count.
    """
    folder = run or f"runs/{spec.stem}-{space.stem}"
    console = make_console(required=False)
    console.print(f"Folder of the trials: {folder}", highlight=False, markup=False)
    from raymask.tune.command import TuneOptions, run_tuning

    with handle_interrupts():
        run_tuning(
            console,
            spec,
            space,
            overrides or (),
            folder,
            TuneOptions(samples, scheduler.value, algorithm.value),
            address,
        )


@app.command(epilog="Example: raymask check spec.yaml --address auto")
def check(spec: SpecFile = None, overrides: Overrides = None, address: Address = None) -> None:
    """Check a spec without a search: is everything readable, what is pruned, and what does it cost?"""
    search_spec, _ = read(spec, overrides)
    from raymask.commands.check import show_check

    show_check(make_console(), search_spec, address)


@app.command(epilog="Example: raymask show s3://bucket/runs/mrpc")
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory: a path or a URI.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the report of a finished or running search in the terminal."""
    from raymask.commands.show import show_run

    show_run(make_console(), run, as_json)


@app.command(epilog="Example: raymask compare runs/spec runs/many --html compare.html")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories: paths or URIs.")],
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots to this file.")] = None,
) -> None:
    """Print searches side by side: their results, their cost, and the keys in which their specs differ."""
    from raymask.commands.show import show_comparison

    show_comparison(make_console(), runs, html)


@app.command("eval", epilog="Example: raymask eval runs/spec/export --task runs/spec/spec.yaml")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, or a folder: a checkpoint, or a run's export.")
    ],
    task: Annotated[
        str, typer.Option(metavar="TASK", help="A task's name (glue/mrpc), or a YAML spec such as a run's.")
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate any checkpoint as a search's report does: on all rows of test, with 95 % intervals.

    To reproduce a run's table: [bold]raymask eval RUN/export --task RUN/spec.yaml[/bold]
    """
    from raymask.commands.evaluate import show_evaluation

    show_evaluation(make_console(), model, task, overrides or (), as_json)


@app.command(epilog="Example: raymask export runs/spec --to sparse --values fp16")
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory of a finished search: a path or a URI.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf, sparse, onnx or masks")],
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A local folder. Default: export-FORMAT in the run directory.")
    ] = None,
    values: Annotated[Values | None, typer.Option(help="sparse: exact weights (the default), or fp16.")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx: also write int8 weights, and compare their metrics with fp32.")
    ] = False,
    shrink: Annotated[bool, typer.Option("--shrink", help="onnx: remove dead neurons and attention heads.")] = False,
) -> None:
    """Write a finished search's model in another format, and check it against the original."""
    from raymask.export.formats import export_run

    options = {"values": values and values.value, "int8": int8, "shrink": shrink}
    given = {name: value for name, value in options.items() if value}
    console = make_console()
    for line in export_run(run, to, out, **given):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: raymask bench runs/spec --batch 1 --batch 8 --length 64")
def bench(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory of a finished search: a path or a URI.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size in rows, default 1 and 16. Can be repeated.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per row. Default: 128, or as many as the model takes.")
    ] = None,
) -> None:
    """Measure the latency of a finished search's model on this machine, in all forms and all installed runtimes.

    The number of threads is OMP_NUM_THREADS, or the number of cores.
    """
    from raymask.commands.bench import show_bench

    show_bench(make_console(), run, batch or (), length)


@app.command(epilog="Example: raymask submit spec.yaml --run s3://bucket/runs/mrpc --follow")
def submit(
    spec: SpecFile = None,
    overrides: Overrides = None,
    address: JobsAddress = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Run directory: a URI, or a path on the cluster's head node. Default: ~/raymask-runs/<spec's name>."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's log until it ends.")] = False,
) -> None:
    """Run a search as a job on a Ray cluster. Submit the same spec and --run again to continue a stopped or failed one.

    Files with relative paths in the spec are uploaded with the job; absolute paths are paths on the cluster.
    """
    from raymask.commands import jobs as job_commands

    console, source = make_console(), spec_path(spec)
    job = job_commands.submit(console, source, source.stem, overrides or (), address, run)
    if follow:
        raise typer.Exit(job_commands.show_logs(console, job, address, follow=True))
    console.print(f"\nNext: raymask status {job}\n      raymask logs {job} --follow", highlight=False, markup=False)


@app.command(epilog="Example: raymask jobs --address http://head:8265")
def jobs(address: JobsAddress = None) -> None:
    """List the searches that a Ray cluster knows."""
    from raymask.commands.jobs import show_jobs

    show_jobs(make_console(), address)


@app.command(epilog="Example: raymask status raysubmit_qPfzG5Y9BMsnqpRw")
def status(job: Job, address: JobsAddress = None) -> None:
    """Print the state and progress of a job's search."""
    from raymask.commands.jobs import show_status

    show_status(make_console(), job, address)


@app.command(epilog="Example: raymask logs raysubmit_qPfzG5Y9BMsnqpRw --follow")
def logs(
    job: Job,
    address: JobsAddress = None,
    follow: Annotated[bool, typer.Option("--follow", help="Follow the log until the job ends.")] = False,
) -> None:
    """Print a job's log."""
    from raymask.commands.jobs import show_logs

    raise typer.Exit(show_logs(make_console(), job, address, follow))


@app.command(epilog="Example: raymask stop raysubmit_qPfzG5Y9BMsnqpRw")
def stop(job: Job, address: JobsAddress = None) -> None:
    """Stop a job. Its finished work stays in the run directory."""
    from raymask.commands import jobs as job_commands

    job_commands.stop(make_console(), job, address)


@app.command(epilog="Example: raymask fetch raysubmit_qPfzG5Y9BMsnqpRw here")
def fetch(
    job: Job,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A local folder.")],
    address: JobsAddress = None,
) -> None:
    """Copy a job's report, export and journal to a local folder."""
    from raymask.commands import jobs as job_commands

    job_commands.fetch(make_console(), job, folder, address)


def spec_path(path: Path | None) -> Path:
    """The path of a spec, by default the quickstart's."""
    return Path(str(files("raymask") / "quickstart.yaml")) if path is None else path


def read(path: Path | None, overrides: list[str] | None) -> tuple[Spec, str]:
    """Load a spec, by default the quickstart's, and return it with its file's name, which names the run.

    Raises:
        UserError: When the spec has mistakes.
    """
    from raymask.config import load_spec

    source = spec_path(path)
    return load_spec(source, overrides or ()), source.stem


@contextmanager
def handle_interrupts() -> Iterator[None]:
    """End with a message and exit code 130 on Ctrl-C, and on SIGTERM, which stops a job.

    A second one does not wait for anything that is still to be closed.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handle_signals(begin_interrupt)
    try:
        yield
    except KeyboardInterrupt:
        handle_signals(lambda *_: os._exit(INTERRUPTED))
        before.clear()
        say_on_stderr(STOPPED)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            if handler is not None:  # it was not set by Python
                signal.signal(number, handler)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call a function on Ctrl-C and SIGTERM, unless whoever started this process has it ignore them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def begin_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Let the command close what it has opened. A second signal ends it at once."""
    handle_signals(end_at_once)
    raise KeyboardInterrupt


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End this process; Ray's processes end with it."""
    make_console(required=False).show_cursor()  # progress bars hide it
    say_on_stderr(STOPPED)
    os._exit(INTERRUPTED)


def make_console(*, required: bool = True) -> Console:
    """The console for output; in a log it is 120 columns wide, so that tables do not wrap.

    Args:
        required: Whether the command ends when its output is lost. A search does not: its results are files.
    """
    from rich.console import Console

    if isinstance(sys.stdout, StandardOutput):
        sys.stdout.required = required
    return Console() if sys.stdout.isatty() else Console(width=120)


def main() -> None:
    """Run the command line.

    Exit code 0 when done, 2 for a mistake that the user can fix, 130 after Ctrl-C, 1 for any other error.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no line for every retry
    try:
        with standard_output():
            app()
    except UserError as error:
        end(2, str(error))
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        sys.exit(1)
    except PermissionError as error:
        end(2, f"{error.filename}: {error.strerror}")
    except Exception as error:  # noqa: BLE001 - of whatever nobody foresaw the user sees one line, not a traceback
        end(1, f"{describe(error)}. {where_traceback(error)}")


def end(code: int, message: str) -> NoReturn:
    """Print a message on stderr, and end with an exit code."""
    say_on_stderr(message)
    sys.exit(code)
