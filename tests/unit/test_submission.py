"""Jobs: what they carry, and what is refused before one is submitted."""

from __future__ import annotations

import io
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.builders import refused, write_table
from support.projects import project_in
from support.records import evaluation

from raymask.commands import jobs
from raymask.config import load_spec, make_spec
from raymask.core.records import EvalPoint
from raymask.executor.connection import auth_mode
from raymask.report import console


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project_in(tmp_path)
    monkeypatch.chdir(folder)
    return folder


# --- packing ---------------------------------------------------------------------------------------------------------


def test_a_job_carries_the_code_the_spec_and_what_it_names_by_relative_paths(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    jobs.build_working_dir(load_spec("spec.yaml"), tmp_path / "job")
    files = {path.relative_to(tmp_path / "job").as_posix() for path in (tmp_path / "job").rglob("*") if path.is_file()}
    carried = {name for name in files if not name.startswith("raymask/")}
    assert carried >= {
        "spec.yaml",
        "project_masks.py",
        "packed/model.name/mine/model.safetensors",
        "packed/model.name/mine/config.json",
        "packed/task.train/train.csv",
        "packed/task.test/report.csv",
    }
    assert {"raymask/cli.py", "raymask/quickstart.yaml", "raymask/core/masking/masks.py"} <= files
    assert not any("__pycache__" in name for name in files)
    here, there = load_spec("spec.yaml"), load_spec(tmp_path / "job" / "spec.yaml")
    assert there.model.name == "packed/model.name/mine"
    assert there.model_copy(update={"model": here.model, "task": here.task}) == here


def test_absolute_paths_and_hub_ids_stay_as_they_are(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    overrides = [f"model={project / 'models' / 'mine'}", "task={name: glue/mrpc, folder: /on/the/cluster}"]
    jobs.build_working_dir(load_spec("spec.yaml", overrides), tmp_path / "job")
    assert not (tmp_path / "job" / "packed").exists()
    assert load_spec(tmp_path / "job" / "spec.yaml").task.folder == "/on/the/cluster"


def test_modules_of_one_s_own_travel_to_the_job_s_folder_where_workers_import_them(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    (project / "own_sampler.py").write_text("def f(): ...")
    (project / "own_package").mkdir()
    for name in ("__init__", "scores", "helpers"):
        (project / "own_package" / f"{name}.py").write_text("def g(): ...")
    own = ["candidates.sampler=own_sampler:f", "mask.score=own_package.scores:g", "select.rule=os.path:exists"]
    jobs.build_working_dir(load_spec("spec.yaml", own), tmp_path / "job")
    assert {path.name for path in (tmp_path / "job").glob("own_*")} == {"own_sampler.py", "own_package"}
    assert {path.name for path in (tmp_path / "job/own_package").glob("*.py")} == {
        "__init__.py",
        "scores.py",
        "helpers.py",
    }
    assert load_spec(tmp_path / "job" / "spec.yaml").mask.score == "own_package.scores:g"
    for name in ("own_sampler", "own_package", "own_package.scores"):
        del sys.modules[name]


def test_of_a_glue_folder_only_the_task_travels(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    for name in ("mrpc", "rte"):
        write_table(project / "glue" / name / "train.parquet", {"a": [1]})
    jobs.build_working_dir(load_spec("spec.yaml", ["task={name: glue/mrpc, folder: glue}"]), tmp_path / "job")
    assert [path.name for path in (tmp_path / "job/packed/task.folder/glue").iterdir()] == ["mrpc"]


def test_no_name_in_a_spec_leaves_the_job_s_folder(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    overrides = ["task.test=../shared/../shared/report.csv", "model=../project/models/../models/mine"]
    jobs.build_working_dir(load_spec("spec.yaml", overrides), tmp_path / "job")
    there = load_spec(tmp_path / "job" / "spec.yaml")
    for path in (there.model.name, there.task.test, there.task.train):
        assert path is not None
        assert (tmp_path / "job" / path).resolve().is_relative_to((tmp_path / "job").resolve())
        assert ".." not in path


def test_a_link_travels_by_its_own_name_and_nothing_is_left_behind(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (project / "data" / "train.csv").rename(project / "blob")
    (project / "data" / "train.csv").symlink_to(project / "blob")
    (project / "models" / "mine" / ".gitignore").write_text("*\n")
    jobs.build_working_dir(load_spec("spec.yaml"), tmp_path / "job")
    assert (tmp_path / "job/packed/task.train/train.csv").read_bytes() == (project / "blob").read_bytes()
    assert not (tmp_path / "job/packed/model.name/mine/.gitignore").exists()


def test_a_file_that_is_not_here_is_said_unless_its_path_is_the_cluster_s(project: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    overrides = ["task.train=/on/the/cluster.csv", "task.test=typo.csv"]
    said = refused(jobs.check, console, load_spec("spec.yaml", overrides))
    assert said == "task.test: typo.csv: there is no such file here; only absolute paths are looked up on the cluster"
    jobs.check(console, load_spec("spec.yaml", overrides[:1]))
    assert console.file.getvalue().startswith("Not checked here: /on/the/cluster.csv")  # type: ignore[attr-defined]
    (project / "models" / "mine" / "broken").symlink_to("nowhere")
    assert "models/mine: cannot be copied" in refused(jobs.build_working_dir, load_spec("spec.yaml"), tmp_path)


def test_what_is_too_large_to_travel_is_said_with_what_to_do(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_PACKAGE_BYTES", 10_000)
    (tmp_path / "job").mkdir()
    said = refused(jobs.build_working_dir, load_spec("spec.yaml"), tmp_path / "job")
    assert "models/mine" in said
    assert "name them by absolute paths" in said


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_run_directory_that_would_end_with_the_job_is_refused() -> None:
    assert "--run runs/x: a job's own folder is deleted with the job" in refused(jobs.job_run_dir, "runs/x", "x")
    assert jobs.job_run_dir("s3://bucket/x?region=us-east-1", "x") == "s3://bucket/x?region=us-east-1"
    assert jobs.job_run_dir(None, "x") == "~/raymask-runs/x"


def test_a_password_never_becomes_a_job_s_metadata() -> None:
    said = refused(jobs.job_run_dir, "s3://key:hunter2@bucket/x", "x")
    assert "credentials do not belong in a URI" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ftp://host", "http://h:abc", "http://h:99999", "http://[::1"])
def test_an_address_that_is_none_is_said(address: str) -> None:
    said = refused(jobs.show_jobs, Console(file=io.StringIO()), address)
    assert said == f"--address {address}: the jobs server's address looks like http://127.0.0.1:8265"


def test_an_address_in_the_environment_is_said_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "auto")
    said = refused(jobs.show_jobs, Console(file=io.StringIO()), None)
    assert said == "$RAY_API_SERVER_ADDRESS is auto: the jobs server's address looks like http://127.0.0.1:8265"


def test_an_address_where_nothing_answers_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = refused(jobs.show_jobs, Console(file=io.StringIO()), address)
    assert f"--address {address}: no Ray jobs server answers there" in said


@pytest.mark.parametrize(
    ("named", "mode"),
    [
        ({}, "disabled"),
        ({"RAY_AUTH_TOKEN": ""}, "disabled"),
        ({"RAY_AUTH_TOKEN": "x"}, "token"),
        ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/a/token"}, "token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}, "disabled"),
    ],
)
def test_a_token_is_used_where_there_is_one(
    named: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **named}.items():
        monkeypatch.setenv(name, value)
    assert auth_mode() == mode


# --- what a job's log tells -------------------------------------------------------------------------------------------


POINT = EvalPoint(step=1, loss=0.5, metric=0.5)


def test_the_status_of_a_job_says_from_its_log_how_far_it_is_until_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    log = Console(file=io.StringIO(), width=80)
    lines = console.LogCallback(
        log, make_spec({"model": "quickstart", "task": "quickstart", "candidates": {"count": 3}})
    )
    lines.on_phase_begin("level 1/4: early evaluation", 1, 4)
    for now in (11.0, 22.0):
        lines.on_progress({"candidate 1": now / 44, "magnitude mask": 0.1})
        lines.on_evaluation(evaluation(int(now)).model_copy(update={"seconds": 9.0, "curve": (POINT,)}))
    job = SimpleNamespace(
        submission_id="raymask-x",
        status=SimpleNamespace(value="RUNNING"),
        metadata={"raymask": "1", "run": "/runs/x"},
        message="",
    )

    @contextmanager
    def connected(address: str | None) -> Iterator[SimpleNamespace]:
        text = log.file.getvalue()  # type: ignore[attr-defined]
        yield SimpleNamespace(list_jobs=lambda: [job], get_job_logs=lambda name: text)

    monkeypatch.setattr(jobs, "job_client", connected)

    def status() -> list[str]:
        console = Console(file=io.StringIO(), width=300)
        jobs.show_status(console, "raymask-x", None)
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined]

    first, run, progress, last = status()
    assert (first, run) == ("raymask-x: RUNNING", "run directory: /runs/x")
    assert re.fullmatch(r"level 1/4.*: 1 of 4 done, 2 running .*about .* left", progress)
    assert last.startswith("  [  22.0 s]   ")
    job.status.value = "FAILED"
    said = status()
    assert said[0] == "raymask-x: FAILED"
    assert said[-1] == "To try again, submit the same spec with --run /runs/x"
    assert not any(line.startswith("level 1/4") for line in said)
