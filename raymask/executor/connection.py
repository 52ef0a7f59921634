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
from urllib.parse import urlsplit

import ray
from ray._private.services import get_ray_address_from_environment
from ray.exceptions import RayError

from raymask.core.errors import UserError, first_line
from raymask.executor.resources import Resources, private_resources

if TYPE_CHECKING:
    from raymask.train.context import WorkerContext

PORT = 6379  # default port of Ray's head node

CONNECT_TIMEOUT_S = 10.0  # seconds in which a cluster must accept a connection

RAY_DIR_VARIABLE = "RAYMASK_RAY_DIR"
RAY_DIR = "/tmp"  # noqa: S108 - socket paths must be short; mkdtemp makes the folder private
SESSION_PREFIX = "raymask-"

MIN_DISK_BYTES = 2**26  # free bytes below which a private Ray does not start


@contextmanager
def ray_connection(context: WorkerContext, address: str | None) -> Iterator[None]:
    """Connect this process to Ray for the block; an existing connection is used as it is.

    A private Ray listens on loopback only and has its own temporary folder and token. Its first worker processes have
    imported torch and the model's code before they are needed.

    Args:
        context: Gives the number of threads and the model's code.
        address: Address of a running cluster; None starts a private Ray that ends with the block.

    Raises:
        UserError: No cluster answers at `address`, or a private Ray cannot start.
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
    with private_ray(context):
        yield


@contextmanager
def private_ray(context: WorkerContext) -> Iterator[None]:
    """Start a private Ray for the block.

    Args:
        context: Gives the number of threads and the model's code.

    Raises:
        UserError: It cannot start.
    """
    available = private_resources()
    root = Path(os.environ.get(RAY_DIR_VARIABLE) or RAY_DIR).expanduser().absolute()
    remove_stale_sessions(root)
    folder = make_session_folder(root)
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
            try:
                with quiet_ray_init():
                    init_private_ray(folder, available, ["transformers", "raymask.train.worker", model_code])
                yield
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def init_private_ray(folder: str, available: Resources, preloaded_modules: list[str]) -> None:
    """Start a private Ray, and connect this process to it.

    Args:
        folder: Its temporary folder.
        available: Its resources.
        preloaded_modules: Modules that its worker processes import before they are needed.

    Raises:
        UserError: It does not start.
    """
    try:
        ray.init(
            "local",
            num_cpus=int(available["CPU"]),
            num_gpus=int(available["GPU"]),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _memory=int(available["memory"]),
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            _system_config={"preload_python_modules": preloaded_modules},
        )
    except Exception as error:  # noqa: BLE001 - Ray raises errors of all types, even Exception itself
        raise start_error(Path(folder).parent, first_line(error).rstrip(".")) from None


def make_session_folder(root: Path) -> str:
    """Make a private Ray's folder for sockets and other temporary files.

    Args:
        root: The folder in which it is made.

    Raises:
        UserError: It cannot be made, or the disk is full.
    """
    try:
        free = shutil.disk_usage(root).free
        if free < MIN_DISK_BYTES:
            raise start_error(root, f"{root} has {free / 2**20:.0f} MiB free, and Ray needs {MIN_DISK_BYTES >> 20} MiB")
        return tempfile.mkdtemp(prefix=f"{SESSION_PREFIX}{os.getpid()}-", dir=root)
    except OSError as error:
        raise start_error(root, f"no folder can be made in {root}: {error.strerror}") from None


def start_error(root: Path, reason: str) -> UserError:
    """The error to raise when a private Ray cannot start.

    Args:
        root: The folder in which its own folder is, or would be.
        reason: Why it cannot start.
    """
    return UserError(
        f"Ray cannot start on this machine: {reason}. Its sockets and temporary files are in {root}: name another "
        f"folder, with a short path, in ${RAY_DIR_VARIABLE}, or search without Ray (`raymask search --in-process`)"
    )


def connect_to_cluster(address: str) -> None:
    """Connect to a running cluster.

    Args:
        address: `host:port`, `host`, or `auto` for $RAY_ADDRESS or this machine's cluster.

    Raises:
        UserError: The address is of another kind, or no cluster answers.
    """
    by_variable = address == "auto" and bool(os.environ.get("RAY_ADDRESS"))
    source = f"--address {address}" + (f" ($RAY_ADDRESS={os.environ['RAY_ADDRESS']})" if by_variable else "")
    try:
        resolved = get_ray_address_from_environment(address, None) if address == "auto" else address
        require_gcs_address(resolved, source)
        gcs_address = resolved if ":" in resolved else f"{resolved}:{PORT}"
        host, port = gcs_address.rsplit(":", 1)
        # Ray itself tries for 14 minutes.
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        with quiet_ray_init(), set_environment(RAY_ADDRESS=""):  # it would override the address
            ray.init(gcs_address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise UserError(
            f"{source}: no Ray cluster answers there ({first_line(error)}). Start one with `ray start --head`, or "
            "leave out --address to use this machine alone"
        ) from None


def require_gcs_address(address: str, source: str) -> None:
    """Check that an address is not of another kind that Ray knows.

    Args:
        address: The address.
        source: The option or variable that gives it, for the message.

    Raises:
        UserError: It is the dashboard's, or one for Ray Client.
    """
    if "://" in address:
        parts = urlsplit(address)
        what = "the address of Ray's dashboard" if parts.scheme in ("http", "https") else "an address for Ray Client"
        host = parts.hostname or "HOST"
        raise UserError(
            f"{source}: is {what}. On a machine of the cluster, give HOST or HOST:PORT of its head node, such as "
            f"{host}:{PORT}. From elsewhere, submit a job: `raymask submit --address http://{host}:8265`"
        )


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


def remove_stale_sessions(root: Path) -> None:
    """Remove the temporary folders of drivers that were killed before they could remove them.

    Args:
        root: The folder in which they were made.
    """
    for folder in root.glob(f"{SESSION_PREFIX}[0-9]*-*"):
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
