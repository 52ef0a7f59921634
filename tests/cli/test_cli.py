"""The command line as a user types it: help, options, messages and exit codes."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import typer
from support.cli import raymask, refused_command, run_main, typed, write_search
from support.fake_ray import FakeRay
from support.fakes import Fakes, setup_of
from support.paths import RAYMASK

from raymask.cli import app, handle_interrupts
from raymask.core import stats
from raymask.core.errors import UserError
from raymask.driver.result import build_result
from raymask.executor import ray_executor
from raymask.runs.run_dir import RunDir, open_run
from raymask.version import __version__

TREE = ["--set", "early_eval.rungs=[0.5, 1.0]", "--set", "select={keep: 2, beam: true}"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec of a tiny model and task."""
    return write_search(tmp_path_factory.mktemp("project"))


def spec_file(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


def test_every_command_s_help_has_an_example_that_it_takes() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        program, called, *words = shlex.split(command.epilog.removeprefix("Example: "))
        assert (program, called) == ("raymask", name)
        assert command.make_context(name, words).params


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    done = raymask("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("search", "check", "show"))
    code = "import sys, raymask.cli; print({'torch', 'ray', 'transformers', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_versions_of_all_that_matters_are_printed() -> None:
    lines = typed("--version").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["raymask", "Ray", "torch", "transformers", "Python"]
    assert lines[0] == f"raymask {__version__}"
    assert lines[2] == f"torch {torch.__version__}"


# --- output that cannot be written, and the end ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">&-", 0, "raymask: standard output is closed; going on without it\n"),
        ("> /dev/full", 2, "raymask: standard output: cannot be written: No space left on device\n"),
        ("| true", 0, ""),
    ],
)
def test_output_that_is_lost_is_one_line_at_most(redirection: str, code: int, said: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"'{RAYMASK}' --version {redirection}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_a_search_ends_well_though_its_output_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    search_setup = setup_of()
    with open_run(RunDir(tmp_path), search_setup.recipe.spec) as store:
        Fakes(search_setup).run(store)
        build_result(search_setup, store, 1.0)
    with open("/dev/full", "w") as full, patch.object(sys, "stdout", full), pytest.raises(SystemExit) as end:
        run_main("search", tmp_path / "spec.yaml", "--run", tmp_path)
    assert not end.value.code
    lost = "raymask: standard output: cannot be written: No space left on device; going on without it\n"
    assert capsys.readouterr().err == lost


def test_an_error_that_nobody_foresaw_is_one_line_and_a_file(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("raymask.commands.check.prepare", lambda spec: 1 / 0)
    done = typed("check", spec)
    assert done.returncode == 1
    [file] = tmp_path.iterdir()
    assert done.stderr == f"raymask: ZeroDivisionError: division by zero. The traceback is in {file}\n"


SLOW_TO_CLOSE = """
import time
from raymask.cli import handle_interrupts
with handle_interrupts():
    try:
        print("works", flush=True)
        time.sleep(60)
    finally:
        print("closes", flush=True)
        time.sleep(60)
"""


def test_a_second_ctrl_c_does_not_wait() -> None:
    command = [sys.executable, "-c", SLOW_TO_CLOSE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("works\n", "closes\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "raymask: stopped. Run the same command again to continue\n")


def test_whatever_ends_a_command_the_signals_are_the_caller_s_again() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with handle_interrupts():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(UserError, match="a mistake"), handle_interrupts():
        raise UserError("a mistake")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_process_that_refuses_ends_with_code_2_and_one_message(tmp_path: Path) -> None:
    done = raymask("search", tmp_path / "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("raymask: ")
    assert "nowhere.yaml: there is no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_mistakes_of_a_spec_are_said_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    path = spec_file(tmp_path, "model: m\ntask: glue/mrcp\nearly_eval: {epocs: 1}\nlevels: [0.9, 0.5]\n")
    said = refused_command("search", path, "--run", tmp_path / "run")
    for part in (
        "task: no task is called 'glue/mrcp'",
        "early_eval.epocs: there is no such key",
        "levels: sparsities must",
    ):
        assert part in said
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = spec_file(tmp_path, f"model: {tmp_path / 'folder'}\ntask: glue/mrpc\n")
    said = refused_command("search", path, "--run", tmp_path / "run")
    assert "the folder needs config.json, model.safetensors and a tokenizer" in said
    assert not (tmp_path / "run").exists()


def test_an_override_that_is_none_is_said() -> None:
    assert "write it as key=value" in refused_command("check", "--set", "candidates")


def test_a_password_in_a_run_s_uri_is_refused_and_never_printed() -> None:
    said = typed("search", "--run", "s3://key:hunter2@bucket/run")
    assert said.returncode == 2
    assert "credentials do not belong in a URI" in said.stderr
    assert "hunter2" not in said.stdout + said.stderr


def test_what_is_no_run_cannot_be_shown(tmp_path: Path) -> None:
    assert "is not a run directory" in refused_command("show", tmp_path)


def test_a_path_may_look_like_markup(tmp_path: Path) -> None:
    (tmp_path / "a[").mkdir()
    assert "a[/x]: is not a run directory" in refused_command("show", "a[/x]", cwd=tmp_path)


def test_a_gpu_that_is_not_there_is_said_at_once_and_nothing_is_trained(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRay([2]).install(monkeypatch)
    monkeypatch.setattr(ray_executor, "ray_connection", lambda context, address: nullcontext())
    said = refused_command("search", spec, "--run", tmp_path / "run", "--set", "workers.gpus=1")
    assert "no node can hold a worker: one asks for 1 CPUs, 1 GPUs" in said
    assert not (tmp_path / "run").exists()


# --- check, show, compare and audit ----------------------------------------------------------------------------------


def test_check_says_when_no_worker_fits(spec: Path) -> None:
    said = refused_command("check", spec, "--set", "workers.cpus=1000")
    assert "no node can hold a worker: one asks for 1000 CPUs" in said


def test_check_says_when_a_worker_of_several_processes_does_not_fit(spec: Path) -> None:
    said = refused_command("check", spec, "--set", "workers.cpus=0.25", "--set", "workers.fsdp=1024")
    assert "no node can hold a worker: one asks for 0.25 CPUs" in said
    assert "for each of its 1024 processes (workers.fsdp)" in said.replace("\n", " ")


def test_check_says_what_will_be_pruned_and_what_it_costs(tmp_path: Path) -> None:
    done = typed("check", "--set", "candidates.count=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "matrices with",
        "3,600 train, 400 validation (400 of them score candidates), 1,000 test",
        "magnitude mask + 3",
        "epochs of training",
        "GiB per worker",
        "room for",
    ):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_comes_next_can_be_pasted_into_a_shell_whatever_the_run_is_called(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "mein Lauf é"
    run.symlink_to(finished)
    done = typed("search", finished / "spec.yaml", "--run", run, "--in-process")
    assert done.returncode == 0, done.stderr
    [command] = [line for line in done.stdout.splitlines() if "raymask bench" in line]
    assert shlex.split(command.partition(": ")[0]) == ["raymask", "bench", str(run)]


def test_check_says_how_rungs_and_a_beam_are_peopled(spec: Path) -> None:
    done = typed("check", spec, *TREE, "--set", "candidates.count=8")
    assert done.returncode == 0, done.stderr
    assert (
        "rungs    of 8 random masks 8 to 50%, 4 to 100% of the early evaluation, and every magnitude mask\n"
        in done.stdout
    )
    for part in (" magnitude mask + 8 ", " 2 x (magnitude mask + 8) "):
        assert part in done.stdout


def test_check_says_how_workers_that_would_stand_idle_can_be_used(spec: Path) -> None:
    quarter = ("--set", "workers.cpus=0.25", "--set", "workers.count=4", "--set", "imp.run=false")
    said = "fine-tuning uses 1 of 4 workers: finetune.data_parallel lets several train one model"
    assert said in typed("check", spec, *quarter).stdout.replace("\n", " ")
    done = typed("check", spec, *quarter, "--set", "finetune.data_parallel=4")
    assert done.returncode == 0, done.stderr
    assert "idle" not in done.stdout


def test_an_audit_says_how_well_early_scores_agree_with_the_end(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    done = typed("audit", spec, "--in-process", "--run", tmp_path / "run", "--set", "levels=[0.75]")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("all masks, fine-tuned", "candidate 2", "agreement", "with final loss", "1 is the same order"):
        assert part in " ".join(done.stdout.split())
    said = refused_command("audit", spec, "--run", tmp_path / "other", "--set", "candidates.count=1")
    assert "candidates.count: an audit needs 2 or more random masks per level, not 1" in said
