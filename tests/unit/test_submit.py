"""Does a search that runs as a job do what it does here, and can it be followed, stopped, continued and fetched?"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from support.builders import refused, reviews, tiny_model, write_table
from support.clusters import LocalCluster, local_cluster

from raymask import submit
from raymask.config import load_spec
from raymask.core.records import Result
from raymask.driver.cluster import auth_mode
from raymask.store import RunDir

RAYMASK = str(Path(sys.executable).with_name("raymask"))
RAY = str(Path(sys.executable).with_name("ray"))
ROOT = Path(__file__).resolve().parents[2]
SPEC = """
model: models/mine
task: {train: data/train.csv, report: ../shared/report.csv, text: review, label: stars}
levels: [0.5, 0.75]
candidates: {count: 2, ratios: [0.01]}
dense: {epochs: 0}
finetune: {epochs: 1}
distill: false
precision: fp32
"""
MIDDLE = ["--set", "levels=[0.5, 0.9]", "--set", "candidates.count=6", "--set", "dense.epochs=2"]
MIDDLE += ["--set", "probe.epochs=4"]
"""The quickstart, slow enough for several commands to find it running, on a busy machine too."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a spec whose model and files lie at relative paths, one of them outside of it."""
    folder = tmp_path / "project"
    tiny_model(folder / "models" / "mine")
    for name, rows in (("project/data/train.csv", 60), ("shared/report.csv", 20)):
        texts, labels = reviews(rows)
        write_table(tmp_path / name, {"review": texts, "stars": labels})
    (folder / "spec.yaml").write_text(SPEC)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as found:
        yield found


def raymask(cluster: LocalCluster, *words: str | Path, code: int = 0, **env: str) -> str:
    """What the command prints, on both streams."""
    done = subprocess.run(
        [RAYMASK, *map(str, words)],
        env=cluster.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def job_of(said: str) -> str:
    return re.search(r"^(raymask-\S+): submitted", said, re.MULTILINE)[1]


def until(happened: Callable[[], object], seconds: float = 90.0) -> None:
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < seconds, "waited too long"
        time.sleep(0.3)


def journal(run: Path) -> list[str]:
    """All journals' lines; no candidate has two."""
    lines = [line for path in sorted(run.glob("level-*/evaluations.jsonl")) for line in path.read_text().splitlines()]
    keys = [(json.loads(line)["candidate"]["level"], json.loads(line)["candidate"]["index"]) for line in lines]
    assert len(keys) == len(set(keys))
    return lines


def found(run: Path | str) -> Result:
    result = RunDir(run).read_result()
    assert result is not None
    return result


def masks(result: Result) -> list[tuple[str, object, object]]:
    return [(level.digest, level.winner.candidate, level.winner.score) for level in result.levels]


# --- packing ---------------------------------------------------------------------------------------------------------


def test_a_job_carries_the_code_the_spec_and_what_it_names_by_relative_paths(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    submit.pack(load_spec("spec.yaml"), tmp_path / "job")
    files = {path.relative_to(tmp_path / "job").as_posix() for path in (tmp_path / "job").rglob("*") if path.is_file()}
    carried = {name for name in files if not name.startswith("raymask/")}
    assert carried >= {
        "spec.yaml",
        "packed/model.name/mine/model.safetensors",
        "packed/model.name/mine/config.json",
        "packed/task.train/train.csv",
        "packed/task.report/report.csv",
    }
    assert {"raymask/cli.py", "raymask/quickstart.yaml", "raymask/core/masks.py"} <= files
    assert not any("__pycache__" in name for name in files)
    here, there = load_spec("spec.yaml"), load_spec(tmp_path / "job" / "spec.yaml")
    assert there.model.name == "packed/model.name/mine"
    assert there.model_copy(update={"model": here.model, "task": here.task}) == here


def test_absolute_paths_and_hub_ids_stay_as_they_are(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    overrides = [f"model={project / 'models' / 'mine'}", "task={name: glue/mrpc, folder: /on/the/cluster}"]
    submit.pack(load_spec("spec.yaml", overrides), tmp_path / "job")
    assert not (tmp_path / "job" / "packed").exists()
    assert load_spec(tmp_path / "job" / "spec.yaml").task.folder == "/on/the/cluster"


def test_of_a_glue_folder_only_the_task_travels(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    for name in ("mrpc", "rte"):
        write_table(project / "glue" / name / "train.parquet", {"a": [1]})
    submit.pack(load_spec("spec.yaml", ["task={name: glue/mrpc, folder: glue}"]), tmp_path / "job")
    assert [path.name for path in (tmp_path / "job/packed/task.folder/glue").iterdir()] == ["mrpc"]


def test_no_name_in_a_spec_leaves_the_job_s_folder(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    overrides = ["task.report=../shared/../shared/report.csv", "model=../project/models/../models/mine"]
    submit.pack(load_spec("spec.yaml", overrides), tmp_path / "job")
    there = load_spec(tmp_path / "job" / "spec.yaml")
    for path in (there.model.name, there.task.report, there.task.train):
        assert path is not None
        assert (tmp_path / "job" / path).resolve().is_relative_to((tmp_path / "job").resolve())
        assert ".." not in path


def test_a_link_travels_by_its_own_name_and_nothing_is_left_behind(project: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (project / "data" / "train.csv").rename(project / "blob")
    (project / "data" / "train.csv").symlink_to(project / "blob")
    (project / "models" / "mine" / ".gitignore").write_text("*\n")
    submit.pack(load_spec("spec.yaml"), tmp_path / "job")
    assert (tmp_path / "job/packed/task.train/train.csv").read_bytes() == (project / "blob").read_bytes()
    assert not (tmp_path / "job/packed/model.name/mine/.gitignore").exists()


def test_a_file_that_is_not_here_is_said_unless_its_path_is_the_cluster_s(project: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    overrides = ["task.train=/on/the/cluster.csv", "task.report=typo.csv"]
    said = refused(submit.check, console, load_spec("spec.yaml", overrides))
    assert said == "task.report: typo.csv: there is no such file here; absolute paths are the cluster's"
    submit.check(console, load_spec("spec.yaml", overrides[:1]))
    assert console.file.getvalue().startswith("Not checked here: /on/the/cluster.csv")  # type: ignore[attr-defined]
    (project / "models" / "mine" / "broken").symlink_to("nowhere")
    assert "models/mine: cannot be packed" in refused(submit.pack, load_spec("spec.yaml"), tmp_path)


def test_what_is_too_large_to_travel_is_said_with_what_to_do(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "LIMIT", 10_000)
    (tmp_path / "job").mkdir()
    said = refused(submit.pack, load_spec("spec.yaml"), tmp_path / "job")
    assert "models/mine" in said
    assert "name them by absolute paths" in said


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_run_directory_that_would_end_with_the_job_is_refused() -> None:
    assert "--run runs/x: a job's own folder ends with it" in refused(submit.place, "runs/x", "x")
    assert submit.place("s3://bucket/x?region=us-east-1", "x") == "s3://bucket/x?region=us-east-1"
    assert submit.place(None, "x") == "~/raymask-runs/x"


def test_a_password_never_becomes_a_job_s_metadata() -> None:
    said = refused(submit.place, "s3://key:hunter2@bucket/x", "x")
    assert "credentials do not belong in a URI" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ftp://host", "http://h:abc", "http://h:99999", "http://[::1"])
def test_an_address_that_is_none_is_said(address: str) -> None:
    said = refused(submit.show_jobs, Console(file=io.StringIO()), address)
    assert said == f"--address {address}: the jobs server's address looks like http://127.0.0.1:8265"


def test_an_address_where_nothing_answers_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = refused(submit.show_jobs, Console(file=io.StringIO()), address)
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


# --- on a cluster of two nodes ---------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_job_with_the_user_s_own_files_is_followed_listed_shown_and_fetched(
    cluster: LocalCluster, project: Path, tmp_path: Path
) -> None:
    words = ("submit", "spec.yaml", "--run", tmp_path / "run")
    said = raymask(cluster, *words, "--follow", THE_SECRET="hunter2")  # noqa: S106 - which must not travel
    job = job_of(said)
    assert "early evaluation" in said
    assert "ready to load" in said
    assert "\x1b" not in said
    assert said.splitlines()[-1] == f"{job}: SUCCEEDED"

    assert job in raymask(cluster, "jobs", COLUMNS="250")
    status = raymask(cluster, "status", job)
    assert status.startswith(f"{job}: SUCCEEDED\nrun directory: {tmp_path / 'run'}\n")
    assert raymask(cluster, "logs", job).count("early evaluation") == said.count("early evaluation")
    fetched = raymask(cluster, "fetch", job, tmp_path / "here")
    assert f"{tmp_path / 'run'}, as this machine sees it," in fetched
    assert found(tmp_path / "here") == found(tmp_path / "run")
    assert (tmp_path / "here" / "export" / "model.safetensors").exists()
    assert (tmp_path / "here" / "level-1" / "evaluations.jsonl").exists()
    assert not (tmp_path / "here" / "level-1" / "optimizer.safetensors").exists()

    local = subprocess.run([RAYMASK, "search", "spec.yaml", "--in-process"], capture_output=True, text=True)
    assert local.returncode == 0, local.stderr
    assert masks(found(tmp_path / "run")) == masks(found("runs/spec"))

    known = read(f"{cluster.address}/api/jobs/", Authorization=f"Bearer {cluster.token}")
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file())
    for text in (known, written, said):
        assert "hunter2" not in text
        assert cluster.token not in text


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_job_is_measured_stopped_killed_and_continued(cluster: LocalCluster, tmp_path: Path) -> None:
    """Its driver is stopped through the API, then another killed; the third finds what an undisturbed search finds."""
    undisturbed = subprocess.run(
        [RAYMASK, "search", "--in-process", *MIDDLE, "--run", str(tmp_path / "alone")], capture_output=True, text=True
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    run = tmp_path / "run"
    words = ("submit", *MIDDLE, "--run", run)

    first = job_of(raymask(cluster, *words))
    said = raymask(cluster, *words, code=2)
    assert f"job {first} is working in it" in said
    until(lambda: set(metrics(cluster)) >= METRICS)
    values = metrics(cluster)
    assert values["ray_raymask_put_bytes_total"] > 10_000
    told = rf"{first}: RUNNING\nrun directory: {run}\n.*: \d of \d done, \d running.*about .* left\n"
    until(lambda: re.match(told, raymask(cluster, "status", first)))
    until(lambda: (run / "level-1" / "evaluations.jsonl").exists())
    stopped = raymask(cluster, "stop", first)
    assert stopped == f"{first}: STOPPED. To go on, submit the same spec with --run {run}\n"
    last = raymask(cluster, "logs", first).splitlines()[-1]
    assert last == "raymask: stopped; the same command goes on from here"
    known = journal(run)

    second = job_of(raymask(cluster, *words))
    until(lambda: len(journal(run)) > len(known))  # most of the search is still ahead of it
    [driver] = [process for process in processes(cluster) if str(run) in process.cmdline()]
    driver.send_signal(signal.SIGKILL)
    until(lambda: raymask(cluster, "status", second).startswith(f"{second}: FAILED"))
    assert f"submit the same spec with --run {run}" in raymask(cluster, "status", second)
    assert journal(run)[: len(known)] == known
    known = journal(run)

    assert raymask(cluster, *words, "--follow").endswith("SUCCEEDED\n")
    assert journal(run)[: len(known)] == known
    assert masks(found(run)) == masks(found(tmp_path / "alone"))
    assert found(run).rows == found(tmp_path / "alone").rows


METRICS = {
    "ray_raymask_candidates",
    "ray_raymask_level",
    "ray_raymask_best_score",
    "ray_raymask_probe_seconds",
    "ray_raymask_examples_per_second",
    "ray_raymask_seconds_left",
    "ray_raymask_put_bytes_total",
}


def metrics(cluster: LocalCluster) -> dict[str, float]:
    """What Prometheus would read from all nodes: raymask's metrics by name."""
    found = {}
    for file in cluster.folder.rglob("prom_metrics_service_discovery.json"):
        for target in json.loads(file.read_text())[0]["targets"]:
            with suppress(OSError):  # a process that does not serve yet, or no more
                for line in read(f"http://{target}/metrics").splitlines():
                    if line.startswith("ray_raymask"):
                        found[line.split("{")[0]] = float(line.rsplit(" ", 1)[1])
    return found


def read(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:  # noqa: S310 - our own
        return str(answer.read().decode())


def processes(cluster: LocalCluster) -> list[psutil.Process]:
    """The drivers of the cluster's jobs."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[1:4] == ["-m", "raymask", "search"]
    ]


@pytest.mark.faults
def test_the_specs_in_jobs_run_by_ray_job_submit_itself(cluster: LocalCluster, tmp_path: Path) -> None:
    entry = ["raymask", "search", "quickstart.yaml", "--address", "auto", "--run", str(tmp_path / "run")]
    entry += ["--set", "levels=[0.5]", "--set", "candidates.count=1", "--set", "dense.epochs=1"]
    done = subprocess.run(
        [RAY, "job", "submit", "--address", cluster.address, "--working-dir", str(ROOT / "jobs"), "--", *entry],
        env=cluster.environ,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready to load" in done.stdout
    assert len(found(tmp_path / "run").levels) == 1


@pytest.mark.faults
def test_what_the_cluster_does_not_know_or_allow_is_said(cluster: LocalCluster, tmp_path: Path) -> None:
    assert "the cluster knows no such search; `raymask jobs`" in raymask(cluster, "status", "raymask-x", code=2)
    said = raymask(cluster, "jobs", code=2, RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH="")
    assert "refused us" in said
    assert "RAY_AUTH_MODE=token" in said

    began = time.monotonic()
    said = raymask(cluster, "submit", "--follow", "--set", "workers.gpus=1", "--run", tmp_path / "run", code=1)
    assert "no node can hold a worker: one asks for 1 CPUs, 1 GPUs" in said
    assert "the nodes have 1 CPUs, 0 GPUs" in said
    assert time.monotonic() - began < 60
    said = raymask(cluster, "fetch", job_of(said), tmp_path / "here", code=2)
    assert f"this machine sees no run at {tmp_path / 'run'} on the cluster's head node" in said
    assert os.listdir(tmp_path) == []
