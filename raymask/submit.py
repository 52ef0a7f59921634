"""How does a search become a job on a Ray cluster, and how is it watched from elsewhere?

A job is the command `raymask search` on the cluster's head, in a folder that travels with it: the spec, the files that
it names by relative paths, and raymask itself.
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
from tempfile import TemporaryDirectory
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
from raymask.report.terminal import PROGRESS, say
from raymask.report.words import duration
from raymask.storage import Folder, require_no_secret
from raymask.store import RunDir

DASHBOARD = "http://127.0.0.1:8265"
LIMIT = 100 * 2**20  # bytes: Ray's dashboard takes no larger package
LEFT_BEHIND = ("__pycache__", ".git", ".gitignore", ".rayignore")
PACKED = "packed"
RUNS = "~/raymask-runs"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPING = 30.0  # seconds in which a stopped job must have ended


def submit(
    console: Console, source: Path, name: str, overrides: Sequence[str], address: str | None, run: str | None
) -> str:
    """Check a spec here, pack what it needs, and submit its search; returns the job's id."""
    spec = load_spec(source, overrides)
    run = place(run, name)
    with connected(address) as client:
        rival = next((job for job in listed(client) if job.metadata["run"] == run and job.status not in ENDED), None)
    if rival:
        raise UserError(f"--run {run}: job {rival.submission_id} is working in it; wait for it, or stop it first")
    check(console, spec)
    with TemporaryDirectory(prefix="raymask-") as folder:
        pack(spec, Path(folder))
        with connected(address) as client:
            job = client.submit_job(
                submission_id=f"raymask-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{uuid.uuid4().hex[:8]}",
                entrypoint=f"exec python -m raymask search spec.yaml --address auto --run {shlex.quote(run)}",
                runtime_env={"working_dir": folder},
                metadata={"raymask": version.__version__, "spec": name, "run": run},
            )
    say(console, f"{job}: submitted; its run directory is {run}")
    if run.startswith(RUNS):
        say(console, "It lies on the cluster's head node: with --run give storage that outlives the cluster")
    return str(job)


def place(run: str | None, name: str) -> str:
    """The run directory as the cluster will understand it."""
    if run is None:
        return f"{RUNS}/{name}"
    if not (run.startswith(("/", "~")) or "://" in run):
        raise UserError(
            f"--run {run}: a job's own folder ends with it: give a URI, or an absolute path that the cluster's head has"
        )
    require_no_secret(run)  # the rest of it is for the cluster to reach
    return run


def check(console: Console, spec: Spec) -> None:
    """Read what a search would read, weights apart, unless it lies where only the cluster sees it."""
    from raymask.driver.search import prepare

    missing = {key: path for key, path in paths(spec).items() if not Path(path).exists()}
    for key, path in missing.items():
        if not Path(path).is_absolute():
            raise UserError(f"{key}: {path}: there is no such file here; absolute paths are the cluster's")
    elsewhere = missing.values()
    if elsewhere:
        say(console, f"Not checked here: {', '.join(elsewhere)}; absolute paths are the cluster's")
    else:
        prepare(spec)


def paths(spec: Spec) -> dict[str, str]:
    """Keys of the spec that name files or folders; a model that is no folder here is a hub's."""
    task = spec.task
    named = {"task.folder": task.folder, "task.train": task.train, "task.report": task.report}
    found = {key: path for key, path in named.items() if path is not None}
    if Path(spec.model.name).is_absolute() or Path(spec.model.name).is_dir():
        found["model.name"] = spec.model.name
    return found


def pack(spec: Spec, folder: Path) -> None:
    """Fill the job's folder: raymask, the files that relative paths name, and the spec that names them there.

    Raises UserError when it cannot be filled, or is too large to travel.
    """
    copy(Path(version.__file__).parent, folder / "raymask")
    data = spec.model_dump(mode="json")
    for key, path in paths(spec).items():
        if Path(path).is_absolute():
            continue
        source = Path(os.path.abspath(path))  # not where a link leads to: endings tell what a file is
        target = Path(PACKED, key, source.name)
        section, entry = key.split(".")
        data[section][entry] = str(target)
        inner = spec.task.name.removeprefix("glue/") if key == "task.folder" and spec.task.name else ""
        copy(source / inner, folder / target / inner)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT:
        raise UserError(
            f"{', '.join(paths(spec).values())}: {size / 2**20:.0f} MiB, and at most {LIMIT // 2**20} MiB travel with "
            "a job: put the large ones where the cluster's head sees them, and name them by absolute paths"
        )
    (folder / "spec.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """A file or a folder, without what would make Ray leave files behind."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        else:
            shutil.copy(source, target)
    except OSError as error:
        raise UserError(f"{source}: cannot be packed: {first_line(error)}") from None


def show_jobs(console: Console, address: str | None) -> None:
    """All searches that the cluster knows, the latest first."""
    with connected(address) as client:
        jobs = sorted(listed(client), key=lambda job: job.start_time or 0, reverse=True)
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
    """Where a job is: its state, how far its search has come, and what it said last."""
    with connected(address) as client:
        found = info(client, job)
        lines = [line for line in client.get_job_logs(job).splitlines() if line.strip()]
    say(console, f"{job}: {found.status.value}")
    say(console, f"run directory: {found.metadata['run']}")
    progress = [line.partition(PROGRESS)[2] for line in lines if f"] {PROGRESS}" in line]
    if progress and found.status.value not in ENDED:
        say(console, progress[-1])
    for line in lines[-1:] if found.status.value == "RUNNING" else lines[-5:]:
        say(console, f"  {line}")
    if found.status.value not in ENDED and not lines:
        say(console, str(found.message or ""))
    if found.status.value in ("FAILED", "STOPPED"):
        say(console, f"To go on, submit the same spec with --run {found.metadata['run']}")


def show_logs(console: Console, job: str, address: str | None, follow: bool) -> int:
    """Print a job's log, until it ends when followed; returns 0 unless a followed job did not succeed."""
    with connected(address) as client:
        info(client, job)
        said = "" if follow else client.get_job_logs(job)
    if not follow:
        sys.stdout.write(said)
        return 0
    with connected(address) as client:

        async def tail() -> None:
            async for text in client.tail_job_logs(job):
                sys.stdout.write(text)
                sys.stdout.flush()

        try:
            asyncio.run(tail())
        except KeyboardInterrupt:
            print(f"\nraymask: {job} goes on; raymask logs {job} --follow, raymask stop {job}", file=sys.stderr)
            return 130
        state = ended(client, job)
    say(console, f"{job}: {state}")
    return 0 if state == "SUCCEEDED" else 1


def stop(console: Console, job: str, address: str | None) -> None:
    """End a job and wait until it has ended."""
    with connected(address) as client:
        found = info(client, job)
        if found.status.value in ENDED:
            say(console, f"{job}: has ended already: {found.status.value}")
            return
        client.stop_job(job)
        state = ended(client, job)
    say(console, f"{job}: {state}. To go on, submit the same spec with --run {found.metadata['run']}")


def fetch(console: Console, job: str, folder: Path, address: str | None) -> None:
    """Copy report, export and journal of a job's run from its storage, which this machine must see."""
    with connected(address) as client:
        run = info(client, job).metadata["run"]
    store = RunDir(run)
    names = store.results()
    if not names:
        where = "" if "://" in run else " on the cluster's head node"
        raise UserError(
            f"{job}: this machine sees no run at {run}{where}. Copy it from there, or submit with --run on storage "
            "that both see"
        )
    target = Folder(folder)
    for name in names:
        with store.storage.reading(name) as source, target.writing(name) as path:
            shutil.copy(source, path)
    seen = run if "://" in run else f"{run}, as this machine sees it,"
    say(console, f"{len(names)} files of {seen} are in {folder}: raymask show {folder}")


def listed(client: Any) -> list[Any]:
    """The cluster's jobs that are searches."""
    return [job for job in client.list_jobs() if "raymask" in (job.metadata or {})]


def info(client: Any, job: str) -> Any:
    """What the cluster knows of a job. Raises UserError when it is none of ours."""
    found = next((known for known in listed(client) if known.submission_id == job), None)
    if found is None:
        raise UserError(f"{job}: the cluster knows no such search; `raymask jobs` lists those that it knows")
    return found


def ended(client: Any, job: str) -> str:
    """A job's state once it has ended."""
    started = time.monotonic()
    while (state := str(client.get_job_status(job).value)) not in ENDED:
        if time.monotonic() - started > STOPPING:
            raise UserError(f"{job}: is still {state} after {STOPPING:.0f} s; see `raymask status {job}`")
        time.sleep(0.2)
    return state


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """A client of the jobs server at `address`, or where the environment says. Raises UserError when it fails."""
    from raymask.driver.cluster import ANSWER, auth_mode, environment, reread_environment

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    with environment(RAY_AUTH_MODE=auth_mode()):
        reread_environment()
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.disable(logging.INFO)  # Ray tells of every upload and connection
        try:
            socket.create_connection(host_and_port(where), ANSWER).close()
            yield JobSubmissionClient(where)
        except BrokenPipeError:  # of whoever reads what we print
            raise
        except (OSError, RuntimeError, ClientError, AuthenticationError) as error:
            raise UserError(f"--address {where}: {advice(error)}") from None
        finally:
            logging.disable(logging.NOTSET)


def host_and_port(address: str) -> tuple[str, int]:
    """Where a URL leads to. Raises UserError when it is none."""
    try:
        parts = urlsplit(address)
        port = {"http": parts.port or 80, "https": parts.port or 443}[parts.scheme]
        if not parts.hostname:
            raise ValueError(address)
        return parts.hostname, port
    except (ValueError, KeyError):
        raise UserError(f"--address {address}: the jobs server's address looks like {DASHBOARD}") from None


def advice(error: BaseException) -> str:
    """What to do when the jobs server does not do what it is asked."""
    said = first_line(error)
    if re.search(r"\b40[13]\b|[Aa]uthenticat|Forbidden", str(error)):
        return f"refused us ({said}): set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its token"
    if isinstance(error, OSError):
        return f"no Ray jobs server answers there ({said}): it is the head's dashboard, at port 8265"
    return f"the jobs server said: {said}"
