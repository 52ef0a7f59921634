"""What can be typed? Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raymask.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

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
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster: auto, HOST or HOST:PORT. Without it, a private Ray on this machine.")
]


@app.command()
def search(
    spec: SpecFile = None,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Run directory; runs/<spec's name> when not given.")] = None,
    address: Address = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="One worker in this process, without Ray.")] = False,
) -> None:
    """Prune a model: search, fine-tune, export. The same command again continues.

    [bold]raymask search[/bold] alone runs the quickstart: a small task and a tiny BERT, made on the spot.
    """
    asked, name = read(spec, overrides)
    folder = run or Path("runs") / name
    console = make_console()
    console.print(f"Run directory: {folder}", highlight=False, markup=False)
    from raymask.driver.search import search as run_search
    from raymask.report.terminal import show_result, watching

    try:
        with watching(console) as watch:
            result = run_search(asked, folder, watch, address=address, in_process=in_process)
    except KeyboardInterrupt:
        print("raymask: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    show_result(console, result)
    console.print(f"\nNext: raymask show {folder}", highlight=False, markup=False)
    if spec is None:
        console.print("      raymask search SPEC   for your own model and task; the repository's jobs/ has specs")


@app.command()
def check(spec: SpecFile = None, overrides: Overrides = None, address: Address = None) -> None:
    """Say what a search would do, without doing it: is all readable, what is pruned, what it costs."""
    asked, _ = read(spec, overrides)
    from raymask.check import show_check

    show_check(make_console(), asked, address)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """Print a finished or running search."""
    from raymask.report.show import show_run

    show_run(make_console(), run, as_json)


def read(path: Path | None, overrides: list[str] | None) -> tuple[Spec, str]:
    """The spec, or the quickstart's, and the name that its run gets."""
    from raymask.config import load_spec

    source = Path(str(files("raymask") / "quickstart.yaml")) if path is None else path
    return load_spec(source, overrides or ()), source.stem


def make_console() -> Console:
    """Where output goes: tables need not wrap in a log."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def main() -> None:
    """Run the command line: exit code 0 when done, 2 for a mistake that the user can mend, 130 after Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except UserError as error:
        print(f"raymask: {error}", file=sys.stderr)
        sys.exit(2)
    except PermissionError as error:
        print(f"raymask: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
