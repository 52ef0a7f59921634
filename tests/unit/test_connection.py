"""Addresses of clusters, and a private Ray that cannot start; no Ray is started."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from support.builders import refused

from raymask.executor import connection

CONTEXT: Any = SimpleNamespace(spec=SimpleNamespace(workers=SimpleNamespace(threads=1)), config=Path())

RESOURCES = {"CPU": 3.0, "GPU": 0.0, "memory": 2.0**30}


def start(address: str | None = None) -> None:
    with connection.ray_connection(CONTEXT, address):
        pass


# --- a private Ray ---------------------------------------------------------------------------------------------------


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What `ray.init` is called with; set "raises" to let it fail."""
    called: dict[str, Any] = {}

    def record(*addresses: str, **options: Any) -> None:
        called.update(options, folders=[path.name for path in tmp_path.iterdir()])
        if "raises" in called:
            raise called["raises"]

    monkeypatch.setattr(ray, "init", record)
    monkeypatch.setattr(connection, "private_resources", lambda: RESOURCES)
    monkeypatch.setenv("RAYMASK_RAY_DIR", str(tmp_path))
    return called


def test_it_gets_what_check_counts_in_a_folder_of_its_own(init: dict[str, Any], tmp_path: Path) -> None:
    start()
    assert (init["num_cpus"], init["num_gpus"], init["_memory"]) == (3, 0, 2**30)
    assert Path(init["_temp_dir"]).parent == tmp_path
    assert init["folders"] == [Path(init["_temp_dir"]).name]
    assert list(tmp_path.iterdir()) == []


LONG = "validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /long/path"


@pytest.mark.parametrize("error", [OSError(LONG), ValueError("Attempting to cap object store"), Exception("timed out")])
def test_what_ray_says_when_it_cannot_start_is_one_line_with_advice(
    init: dict[str, Any], tmp_path: Path, error: Exception
) -> None:
    init["raises"] = error
    said = refused(start)
    assert said == (
        f"Ray cannot start on this machine: {error}. Its sockets and temporary files are in {tmp_path}: name another "
        "folder, with a short path, in $RAYMASK_RAY_DIR, or search without Ray (`raymask search --in-process`)"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(
    init: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMASK_RAY_DIR", str(tmp_path / "nowhere"))
    assert f"no folder can be made in {tmp_path}/nowhere: No such file or directory. Its sockets" in refused(start)
    monkeypatch.setenv("RAYMASK_RAY_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda root: SimpleNamespace(free=3 * 2**20))
    assert f"{tmp_path} has 3 MiB free, and Ray needs 64 MiB. Its sockets" in refused(start)
    assert "_temp_dir" not in init


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("http://10.0.0.7:8265", "the address of Ray's dashboard"),
        ("https://10.0.0.7", "the address of Ray's dashboard"),
        ("ray://10.0.0.7:10001", "an address for Ray Client"),
    ],
)
def test_an_address_of_another_kind_is_explained_wherever_it_is_given(
    monkeypatch: pytest.MonkeyPatch, address: str, kind: str
) -> None:
    rest = (
        f"is {kind}. On a machine of the cluster, give HOST or HOST:PORT of its head node, such as 10.0.0.7:6379. "
        "From elsewhere, submit a job: `raymask submit --address http://10.0.0.7:8265`"
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert refused(start, address) == f"--address {address}: {rest}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refused(start, "auto") == f"--address auto ($RAY_ADDRESS={address}): {rest}"
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", 0.001)
    assert refused(start, "127.0.0.1:9").startswith("--address 127.0.0.1:9: no Ray cluster answers there (")


def test_an_address_that_is_given_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    monkeypatch.setattr(connection.socket, "create_connection", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(ray, "init", lambda address, **_: seen.append((address, connection.os.environ["RAY_ADDRESS"])))
    start("10.0.0.8")
    start("auto")
    assert seen == [("10.0.0.8:6379", ""), ("10.0.0.7:6379", "")]
