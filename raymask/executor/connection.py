"""Connection of this process to Ray: one that exists, a cluster, or a private Ray on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray._private.services import get_ray_address_from_environment
from ray.exceptions import RayError

from raymask.core.errors import UserError, first_line

if TYPE_CHECKING:
    from raymask.train.context import WorkerContext

PORT = 6379  # default port of Ray's head node

CONNECT_TIMEOUT_S = 10.0  # seconds in which a cluster must accept a connection

SESSION_ROOT, SESSION_PREFIX = "/tmp", "raymask-"  # noqa: S108 - socket paths must be short; mkdtemp makes the folder private


@contextmanager
def ray_connection(context: WorkerContext, address: str | None) -> Iterator[None]:
    """Connect this process to Ray for the block; an existing connection is used as it is.

    A private Ray listens on loopback only and has its own temporary folder and token. Its first worker processes have
    imported torch and the model's code before they are needed.

    Args:
        context: Gives the number of threads and the model's code.
        address: Address of a running cluster; None starts a private Ray that ends with the block.

    Raises:
        UserError: No cluster answers at `address`.
    """
    if ray.is_initialized():
        yield
        return
    if address:
        with set_environment(RAY_AUTH_MODE=auth_mode(), RAY_USAGE_STATS_ENABLED="0"):
            reread_environment()
            connect_to_cluster(address)
            try:
                yield
            finally:
                ray.shutdown()
        return
    remove_stale_sessions()
    folder = tempfile.mkdtemp(prefix=f"{SESSION_PREFIX}{os.getpid()}-", dir=SESSION_ROOT)
    private = {
        "RAY_ADDRESS": "",  # would override "local"
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": str(context.spec.workers.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
    }
    model_code = type(context.config).__module__.replace("configuration_", "modeling_")
    try:
        with set_environment(**private), keep_loopback_address():
            reread_environment()
            with quiet_ray_init():
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


def connect_to_cluster(address: str) -> None:
    """Connect to a running cluster.

    Args:
        address: `host:port`, `host`, or `auto` for $RAY_ADDRESS or this machine's cluster.

    Raises:
        UserError: No cluster answers.
    """
    try:
        resolved = get_ray_address_from_environment(address, None)
        gcs_address = resolved if ":" in resolved else f"{resolved}:{PORT}"
        host, port = gcs_address.rsplit(":", 1)
        # Ray itself tries for 14 minutes.
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        with quiet_ray_init():
            ray.init(gcs_address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({first_line(error)}). Start one with `ray start "
            "--head`, or leave out --address for a private one"
        ) from None


@contextmanager
def quiet_ray_init() -> Iterator[None]:
    """Keep Ray's own output out of the log when the block connects to Ray.

    Ray replaces this process's SIGTERM handler by one that prints a page of addresses. And although
    `log_to_driver=False`, it prints a raylet's last log lines in colours when a node dies.
    """
    from ray._private import worker

    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    worker._worker_logs_enabled = False


def auth_mode() -> str:
    """The authentication mode for a cluster.

    Returns:
        $RAY_AUTH_MODE if it is set; else "token" when a token exists (in the environment or in ~/.ray), or "disabled".
    """
    token_in_environment = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    has_token = token_in_environment or (Path.home() / ".ray" / "auth_token").exists()
    return os.environ.get("RAY_AUTH_MODE") or ("token" if has_token else "disabled")


def reread_environment() -> None:
    """Make Ray read the authentication variables again; it reads them once, when it is imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def remove_stale_sessions() -> None:
    """Remove the temporary folders of drivers that were killed before they could remove them."""
    for folder in Path(SESSION_ROOT).glob(f"{SESSION_PREFIX}[0-9]*-*"):
        try:
            os.kill(int(folder.name.split("-")[1]), 0)  # sends nothing: fails when the process does not exist
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # the process exists and belongs to another user


@contextmanager
def keep_loopback_address() -> Iterator[None]:
    """Let Ray keep 127.0.0.1 as this node's address, as on macOS; elsewhere Ray replaces it by a reachable one."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def set_environment(**values: str) -> Iterator[None]:
    """Set environment variables for the block, in this process and in those that it starts.

    Args:
        **values: Value by variable name.
    """
    before = {name: os.environ.get(name) for name in (*values, "PYTHONBREAKPOINT")}  # ray.init sets the last one
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
