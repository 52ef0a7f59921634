"""Which Ray, how does this process get to it, and what does it have?"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray._private.services import get_ray_address_from_environment
from ray.exceptions import RayError

from raymask.core.errors import UserError, first_line

if TYPE_CHECKING:
    from raymask.train.worker import Job

PORT = 6379
ANSWER = 10.0  # seconds in which a cluster must accept a connection
ROOT, FOLDER = "/tmp", "raymask-"  # noqa: S108 - sockets live in it, whose paths must be short; mkdtemp makes it ours

Resources = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU, memory in bytes."""


def needs(job: Job, nodes: Sequence[Resources]) -> Resources:
    """What one worker takes; a GPU each where the nodes have any and the spec does not say."""
    gpus = job.spec.workers.gpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    return {"CPU": job.spec.workers.cpus, "GPU": gpus, "memory": job.memory(on_gpu=gpus > 0)}


def slots(need: Resources, nodes: Sequence[Resources], gang: int = 1) -> int:
    """How many workers all nodes together can hold, each of so many processes that have the `need`."""
    processes = sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in need.items() if amount)
        for node in nodes
    )
    return processes // gang


def alive() -> list[Resources]:
    """Resources of every node of the cluster that answers; in a placement group, such as a trial of Ray Tune has, of
    its bundles, since what is started from inside it is placed there.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        return list(group.bundle_specs)
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def require_room(need: Resources, nodes: Sequence[Resources], gang: int = 1) -> None:
    """Raise UserError when the nodes cannot hold even one worker."""
    if not slots(need, nodes, gang):
        each = f" for each of its {gang} processes (workers.gang)" if gang > 1 else ""
        raise UserError(
            f"no node can hold a worker: one asks for {offer(need)}{each} (workers.cpus, workers.gpus, the model's "
            f"memory), the nodes have {'; '.join(map(offer, nodes)) or 'nothing'}. On a cluster that grows by itself, "
            "say with workers.wait how many seconds to wait for it"
        )


def offer(resources: Resources) -> str:
    """Resources in words."""
    memory = resources.get("memory", 0.0) / 2**30
    return f"{resources.get('CPU', 0.0):g} CPUs, {resources.get('GPU', 0.0):g} GPUs, {memory:.1f} GiB"


@contextmanager
def connected(job: Job, address: str | None) -> Iterator[None]:
    """This process connected to Ray: as it is already, to the cluster at `address`, or to a private one.

    The private one listens on loopback only, has a temporary folder and a token of its own, and its first workers
    have imported torch and the model's code before they are asked for.
    """
    if ray.is_initialized():
        yield
        return
    if address:
        with environment(RAY_AUTH_MODE=auth_mode(), RAY_USAGE_STATS_ENABLED="0"):
            reread_environment()
            join(address)
            try:
                yield
            finally:
                ray.shutdown()
        return
    sweep_up()
    folder = tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=ROOT)
    private = {
        "RAY_ADDRESS": "",  # it would win over "local"
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": str(job.spec.workers.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }
    model_code = type(job.config).__module__.replace("configuration_", "modeling_")
    try:
        with environment(**private), loopback():
            reread_environment()
            with unobtrusive():
                ray.init(
                    "local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _node_ip_address="127.0.0.1",
                    _temp_dir=folder,
                    _system_config={"preload_python_modules": ["transformers", "raymask.train.worker", model_code]},
                )
            try:
                yield
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def join(address: str) -> None:
    """Connect to a running cluster; `auto` is $RAY_ADDRESS or this machine's. Raises UserError when none answers."""
    try:
        found = get_ray_address_from_environment(address, None)
        where = found if ":" in found else f"{found}:{PORT}"
        host, port = where.rsplit(":", 1)
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()  # Ray itself asks for 14 minutes
        with unobtrusive():
            ray.init(where, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({first_line(error)}). Start one with `ray start "
            "--head`, or leave out --address for a private one"
        ) from None


@contextmanager
def unobtrusive() -> Iterator[None]:
    """Connect to Ray in the block, and keep its own words out of our log.

    Its handler of SIGTERM, in the place of one that this process has, prints a page of addresses; and in spite of
    `log_to_driver=False` it prints raylets' last words in colours when a node dies.
    """
    from ray._private import worker

    mine = signal.getsignal(signal.SIGTERM)
    yield
    if callable(mine) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, mine)
    worker._worker_logs_enabled = False


def auth_mode() -> str:
    """How to meet a cluster: as the environment says, else with a token where there is one."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = named or (Path.home() / ".ray" / "auth_token").exists()
    return os.environ.get("RAY_AUTH_MODE") or ("token" if token else "disabled")


def reread_environment() -> None:
    """Make Ray see the authentication variables of now: it has read them when it was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def sweep_up() -> None:
    """Remove the temporary folders of drivers that were killed before they could."""
    for folder in Path(ROOT).glob(f"{FOLDER}[0-9]*-*"):
        try:
            os.kill(int(folder.name.split("-")[1]), 0)  # asks only whether it lives
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # it does, and is another user's


@contextmanager
def loopback() -> Iterator[None]:
    """Let Ray keep 127.0.0.1 as this node's address, as on macOS; else it puts a reachable one in its place."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for the block, for this process and those that it starts."""
    before = {name: os.environ.get(name) for name in (*values, "PYTHONBREAKPOINT")}  # which ray.init sets
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
