"""A real cluster on this machine, by cluster/local, and its end."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "cluster" / "local"
ATTEMPTS = 3  # a free port may be taken before Ray gets to it


@dataclass(frozen=True)
class LocalCluster:
    """Two raylets on loopback, guarded by a token."""

    address: str  # the dashboard and the Jobs API, an http URL
    gcs: str  # host:port, for `raymask search --address` and ray.init
    folder: Path  # sessions a (the head) and b (the other node), logs, the token
    env: dict[str, str]  # what clients must have in their environment beside os.environ

    @property
    def environ(self) -> dict[str, str]:
        """A whole environment for a client's process."""
        return clean_environ() | self.env

    @property
    def token(self) -> str:
        return Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()


@contextmanager
def local_cluster(cpus: int = 1, **settings: str) -> Iterator[LocalCluster]:
    """`up` on free ports in a folder of its own, with more environment if wanted; `down` at the end, come what may."""
    home = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
    folder = home / "c"
    try:
        for attempt in range(ATTEMPTS):
            port, dashboard = free_port(), free_port()
            ports = {"PORT": str(port), "DASHBOARD_PORT": str(dashboard)}
            up = script("up", folder, CPUS=str(cpus), **ports, **settings)
            if up.returncode == 0:
                break
            assert attempt + 1 < ATTEMPTS, up.stderr
        env = dict(shlex.split(line)[1].split("=", 1) for line in up.stdout.splitlines())
        yield LocalCluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", folder, env)
    finally:
        down = script("down", folder)
        shutil.rmtree(home, ignore_errors=True)
        assert down.returncode == 0, down.stderr


def script(name: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """One of the two scripts, run to its end. Into files: a daemon that held a pipe would keep us reading."""
    env = clean_environ() | settings | {"RAYMASK_LOCAL_CLUSTER": str(folder)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        command = str(SCRIPTS / name)
        done = subprocess.run([command], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=120)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, out.read(), err.read())


def clean_environ() -> dict[str, str]:
    """This process's environment, the tests' own interpreter first in PATH, without what points to another Ray."""
    foreign = ("ADDRESS", "API_SERVER_ADDRESS", "AUTH_MODE", "AUTH_TOKEN", "AUTH_TOKEN_PATH")
    kept = {name: value for name, value in os.environ.items() if name.removeprefix("RAY_") not in foreign}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
