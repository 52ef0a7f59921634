"""Searches as jobs on a Ray cluster: submit, list, follow, stop and fetch them.

A job runs `raymask search` on the cluster's head node, in a working directory that is uploaded with it: the spec, the
files that it names by relative paths, the modules of its own functions, and raymask itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raymask import version
from raymask.config import load_spec
from raymask.core.errors import UserError, first_line
from raymask.core.spec import Spec
from raymask.report.console import PROGRESS, say
from raymask.report.text import duration
from raymask.runs.local_storage import LocalStorage
from raymask.runs.open import require_no_secret
from raymask.runs.run_dir import RunDir
from raymask.runs.storage import temporary

DASHBOARD = "http://127.0.0.1:8265"  # the default address of the jobs server
MAX_PACKAGE_BYTES = 100 * 2**20  # bytes: the largest working directory that Ray's dashboard takes
EXCLUDED = ("__pycache__", ".git", ".gitignore", ".rayignore")  # names that are not uploaded
PACKED = "packed"  # folder of the uploaded files in the working directory
DEFAULT_RUN_ROOT = "~/raymask-runs"  # where run directories go by default, on the cluster's head node
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")  # states of a job that no longer runs
STOP_TIMEOUT_S = 30.0  # seconds in which a stopped job must end


def submit(
    console: Console, source: Path, name: str, overrides: Sequence[str], address: str | None, run: str | None
) -> str:
    """Check a spec here, upload what it needs, and submit its search.

    Args:
        console: Where the output goes.
        source: The spec's file.
        name: The search's name.
        overrides: Overrides of the spec, `KEY=VALUE`.
        address: URL of the jobs server; None: see `job_client`.
        run: Run directory, a URI or an absolute path on the head node; None: `~/raymask-runs/<name>`.

    Returns:
        The job's id.

    Raises:
        UserError: When the spec is wrong, another job works in the run directory, or the cluster refuses the job.
    """
    spec = load_spec(source, overrides)
    run = job_run_dir(run, name)
    with job_client(address) as client:
        running = next(
            (job for job in list_jobs(client) if job.metadata["run"] == run and job.status not in ENDED), None
        )
    if running:
        raise UserError(f"--run {run}: job {running.submission_id} is working in it; wait for it, or stop it first")
    check(console, spec)
    with temporary() as folder:
        build_working_dir(spec, folder)
        with job_client(address) as client:
            job = client.submit_job(
                submission_id=f"raymask-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{uuid.uuid4().hex[:8]}",
                entrypoint=f"exec python -m raymask search spec.yaml --address auto --run {shlex.quote(run)}",
                runtime_env={"working_dir": str(folder)},
                metadata={"raymask": version.__version__, "spec": name, "run": run},
            )
    say(console, f"{job}: submitted; its run directory is {run}")
    if run.startswith(DEFAULT_RUN_ROOT):
        say(console, "This directory is on the cluster's head node. Use --run for storage that outlives the cluster")
    return str(job)


def job_run_dir(run: str | None, name: str) -> str:
    """The run directory as the cluster sees it.

    Raises:
        UserError: For a relative path, or a URI with a secret in it.
    """
    if run is None:
        return f"{DEFAULT_RUN_ROOT}/{name}"
    if not (run.startswith(("/", "~")) or "://" in run):
        raise UserError(
            f"--run {run}: a job's own folder is deleted with the job: give a URI, or an absolute path on the "
            "cluster's head node"
        )
    require_no_secret(run)  # only the cluster has to reach it
    return run


def check(console: Console, spec: Spec) -> None:
    """Read what a search would read, except weights, unless some of it is on the cluster only.

    Raises:
        UserError: When a file with a relative path is missing, or the search would raise it.
    """
    from raymask.driver.setup import prepare

    missing = {key: path for key, path in spec_paths(spec).items() if not Path(path).exists()}
    for key, path in missing.items():
        if not Path(path).is_absolute():
            raise UserError(
                f"{key}: {path}: there is no such file here; only absolute paths are looked up on the cluster"
            )
    on_cluster = missing.values()
    if on_cluster:
        say(console, f"Not checked here: {', '.join(on_cluster)}; absolute paths are looked up on the cluster")
    else:
        prepare(spec)


def spec_paths(spec: Spec) -> dict[str, str]:
    """Files and folders that the spec names, by key. A model that is no folder here is taken as a hub id."""
    task = spec.task
    keys = ("folder", "train", "validation", "test")
    named = {f"task.{key}": path for key in keys if (path := getattr(task, key)) is not None}
    if Path(spec.model.name).is_absolute() or Path(spec.model.name).is_dir():
        named["model.name"] = spec.model.name
    return named


def build_working_dir(spec: Spec, folder: Path) -> None:
    """Fill the job's working directory: raymask, own modules, files with relative paths, the spec with their new paths.

    Args:
        spec: The search's spec.
        folder: The folder to fill.

    Raises:
        UserError: When a file cannot be copied, or the folder is too large to upload.
    """
    for module in own_modules(spec):
        copy(module, folder / module)
    copy(Path(version.__file__).parent, folder / "raymask")
    data = spec.model_dump(mode="json")
    for key, path in spec_paths(spec).items():
        if Path(path).is_absolute():
            continue
        source = Path(os.path.abspath(path))  # links are not resolved: a file's ending says how to read it
        target = Path(PACKED, key, source.name)
        section, entry = key.split(".")
        data[section][entry] = str(target)
        inner = spec.task.name.removeprefix("glue/") if key == "task.folder" and spec.task.name else ""
        copy(source / inner, folder / target / inner)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MAX_PACKAGE_BYTES:
        uploaded = ", ".join([*spec_paths(spec).values(), *map(str, own_modules(spec))])
        raise UserError(
            f"{uploaded}: {size / 2**20:.0f} MiB, and at most {MAX_PACKAGE_BYTES // 2**20} MiB are uploaded with a "
            "job: put the large ones on the cluster's head node, and name them by absolute paths"
        )
    (folder / "spec.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def own_modules(spec: Spec) -> list[Path]:
    """Files and packages of the current folder that have the spec's own functions. Others must be on the cluster."""
    names = {path.partition(":")[0].partition(".")[0] for path in spec.import_paths.values()}
    return [path for name in sorted(names) for path in (Path(name), Path(f"{name}.py")) if path.exists()]


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, without files that would make Ray ignore others. Raises UserError when it fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*EXCLUDED))
        else:
            shutil.copy(source, target)
    except OSError as error:
        raise UserError(f"{source}: cannot be copied: {first_line(error)}") from None


def show_jobs(console: Console, address: str | None) -> None:
    """Print a table of all searches that the cluster knows, the latest first."""
    with job_client(address) as client:
        jobs = sorted(list_jobs(client), key=lambda job: job.start_time or 0, reverse=True)
    table = Table()
    for head in ("job", "state", "spec", "started", "took", "run directory"):
        table.add_column(head, overflow="fold")
    for job in jobs:
        start, end = (job.start_time or 0) / 1000, (job.end_time or 1000 * time.time()) / 1000
        started = datetime.fromtimestamp(start).strftime("%Y-%m-%d %H:%M") if start else ""
        spec, run = job.metadata["spec"], job.metadata["run"]
        table.add_row(*map(Text, (job.submission_id, job.status.value, spec, started, duration(end - start), run)))
    console.print(table)


def show_status(console: Console, job: str, address: str | None) -> None:
    """Print a job's state, the progress of its search, and the last lines of its log."""
    with job_client(address) as client:
        info = get_job(client, job)
        lines = [line for line in client.get_job_logs(job).splitlines() if line.strip()]
    say(console, f"{job}: {info.status.value}")
    say(console, f"run directory: {info.metadata['run']}")
    progress = [line.partition(PROGRESS)[2] for line in lines if f"] {PROGRESS}" in line]
    if progress and info.status.value not in ENDED:
        say(console, progress[-1])
    for line in lines[-1:] if info.status.value == "RUNNING" else lines[-5:]:
        say(console, f"  {line}")
    if info.status.value not in ENDED and not lines:
        say(console, str(info.message or ""))
    if info.status.value in ("FAILED", "STOPPED"):
        aim = "continue" if info.status.value == "STOPPED" else "try again"
        say(console, f"To {aim}, submit the same spec with --run {info.metadata['run']}")


def show_logs(console: Console, job: str, address: str | None, follow: bool) -> int:
    """Print a job's log.

    Args:
        console: Where the output goes.
        job: The job's id.
        address: URL of the jobs server; None: see `job_client`.
        follow: Go on until the job ends.

    Returns:
        The exit code: 1 when a followed job did not succeed, 130 after Ctrl-C, otherwise 0.
    """
    with job_client(address) as client:
        get_job(client, job)
        log = "" if follow else client.get_job_logs(job)
    if not follow:
        sys.stdout.write(log)
        return 0
    with job_client(address) as client:

        async def tail() -> None:
            async for text in client.tail_job_logs(job):
                sys.stdout.write(text)
                sys.stdout.flush()

        try:
            asyncio.run(tail())
        except KeyboardInterrupt:
            print(
                f"\nraymask: {job} is still running; raymask logs {job} --follow, raymask stop {job}", file=sys.stderr
            )
            return 130
        state = wait_until_ended(client, job)
    say(console, f"{job}: {state}")
    return 0 if state == "SUCCEEDED" else 1


def stop(console: Console, job: str, address: str | None) -> None:
    """Stop a job and wait until it has ended."""
    with job_client(address) as client:
        info = get_job(client, job)
        if info.status.value in ENDED:
            say(console, f"{job}: has already ended: {info.status.value}")
            return
        client.stop_job(job)
        state = wait_until_ended(client, job)
    say(console, f"{job}: {state}. To continue, submit the same spec with --run {info.metadata['run']}")


def fetch(console: Console, job: str, folder: Path, address: str | None) -> None:
    """Copy report, export and journal of a job's run to a local folder.

    Args:
        console: Where the output goes.
        job: The job's id.
        folder: The local folder.
        address: URL of the jobs server; None: see `job_client`.

    Raises:
        UserError: When this machine cannot read the run directory.
    """
    with job_client(address) as client:
        run = get_job(client, job).metadata["run"]
    run_dir = RunDir(run)
    names = run_dir.downloadable_files()
    if not names:
        where = "" if "://" in run else " on the cluster's head node"
        raise UserError(
            f"{job}: this machine finds no run at {run}{where}. Copy it from there, or submit with --run on storage "
            "that both can read"
        )
    target = LocalStorage(folder, "DIR")
    for name in names:
        with run_dir.storage.reading(name) as source, target.writing(name) as path:
            shutil.copy(source, path)
    origin = run if "://" in run else f"{run}, as this machine sees it,"
    say(console, f"{len(names)} files of {origin} are in {folder}: raymask show {shlex.quote(str(folder))}")


def list_jobs(client: Any) -> list[Any]:
    """The cluster's jobs that are searches."""
    return [job for job in client.list_jobs() if "raymask" in (job.metadata or {})]


def get_job(client: Any, job: str) -> Any:
    """The cluster's record of a job. Raises UserError when the cluster knows no search with this id."""
    info = next((info for info in list_jobs(client) if info.submission_id == job), None)
    if info is None:
        raise UserError(f"{job}: the cluster knows no such search; `raymask jobs` lists all searches")
    return info


def wait_until_ended(client: Any, job: str) -> str:
    """Wait until a job ends, and return its state. Raises UserError after STOPPING seconds."""
    started = time.monotonic()
    while (state := str(client.get_job_status(job).value)) not in ENDED:
        if time.monotonic() - started > STOP_TIMEOUT_S:
            raise UserError(f"{job}: is still {state} after {STOP_TIMEOUT_S:.0f} s; see `raymask status {job}`")
        time.sleep(0.2)
    return state


@contextmanager
def job_client(address: str | None) -> Iterator[Any]:
    """Connect to a cluster's jobs server.

    Args:
        address: Its URL; None: `$RAY_API_SERVER_ADDRESS`, or this machine's.

    Yields:
        Ray's JobSubmissionClient.

    Raises:
        UserError: When the server does not answer, or refuses a request inside the block.
    """
    from raymask.executor.connection import CONNECT_TIMEOUT_S, auth_mode, reread_environment, set_environment

    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    source = f"--address {url}" if address or url == DASHBOARD else f"$RAY_API_SERVER_ADDRESS is {url}"
    with set_environment(RAY_AUTH_MODE=auth_mode()):
        reread_environment()
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.disable(logging.INFO)  # Ray logs every upload and connection
        try:
            socket.create_connection(host_and_port(url, source), CONNECT_TIMEOUT_S).close()
            yield JobSubmissionClient(url)
        except BrokenPipeError:  # the reader of our own output has closed it
            raise
        except (OSError, RuntimeError, ClientError, AuthenticationError) as error:
            raise UserError(f"{source}: {advice(error)}") from None
        finally:
            logging.disable(logging.NOTSET)


def host_and_port(address: str, source: str) -> tuple[str, int]:
    """Host and port of a URL; without a port 80 or 443.

    Args:
        address: The URL.
        source: The option or variable that gives it, for the message.

    Raises:
        UserError: It is not an HTTP URL.
    """
    try:
        parts = urlsplit(address)
        port = {"http": parts.port or 80, "https": parts.port or 443}[parts.scheme]
        if not parts.hostname:
            raise ValueError(address)
        return parts.hostname, port
    except (ValueError, KeyError):
        raise UserError(f"{source}: the jobs server's address looks like {DASHBOARD}") from None


def advice(error: BaseException) -> str:
    """What went wrong with the jobs server, and what to do about it."""
    message = first_line(error)
    if re.search(r"\b40[13]\b|[Aa]uthenticat|Forbidden", str(error)):
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its token"
        return f"access was refused ({message}): {remedy}"
    if isinstance(error, OSError):
        return f"no Ray jobs server answers there ({message}): it is the dashboard of the head node, at port 8265"
    return f"the jobs server said: {message}"
