"""The local cluster: two nodes on loopback, closed to whoever has no token."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from support.clusters import SCRIPTS, LocalCluster, clean_environ, local_cluster

from raymask.commands import jobs


def ours(folder: Path) -> set[psutil.Process]:
    """Living processes that `up` with this state folder started, or their descendants."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYMASK_RAYLET_OF") == str(folder):
                found |= {process, *process.children(recursive=True)}
        except psutil.Error:
            continue
    return {process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}


def status_of(url: str, token: str | None) -> int:
    request = urllib.request.Request(url)  # noqa: S310 - it is ours
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_local_cluster_has_two_nodes(cluster: LocalCluster) -> None:
    code = f"import ray; ray.init('{cluster.gcs}', logging_level='ERROR'); print([n['Alive'] for n in ray.nodes()])"
    seen = subprocess.check_output([sys.executable, "-c", code], env=cluster.environ, text=True, timeout=60)
    assert seen.splitlines()[-1] == "[True, True]"


def test_the_local_cluster_listens_on_loopback_only(cluster: LocalCluster) -> None:
    processes = ours(cluster.folder)
    listening = [
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert sum(name == "raylet" for name, _, _ in listening) >= 2
    assert {ip for _, ip, _ in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    ports = {port for _, _, port in listening}
    assert {int(cluster.gcs.split(":")[1]), int(cluster.address.rsplit(":", 1)[1])} <= ports


def test_the_local_cluster_is_closed_without_its_token(cluster: LocalCluster) -> None:
    path = Path(cluster.env["RAY_AUTH_TOKEN_PATH"])
    assert path.parent == cluster.folder
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.folder.stat().st_mode) == 0o700
    url = f"{cluster.address}/api/jobs/"
    assert status_of(url, None) == 401
    assert status_of(url, "0" * 64) == 403
    assert status_of(url, cluster.token) == 200


def test_the_local_cluster_runs_jobs_with_a_folder(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "job.py").write_text(
        "import pathlib, sys, ray\n"
        "from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy\n"
        "ray.init(logging_level='ERROR')\n"
        "@ray.remote(num_cpus=1)\n"
        "def has_the_folder():\n"
        "    return pathlib.Path('job.py').exists()\n"
        "on = [NodeAffinitySchedulingStrategy(node['NodeID'], soft=False) for node in ray.nodes() if node['Alive']]\n"
        "print(ray.get([has_the_folder.options(scheduling_strategy=node).remote() for node in on]), sys.prefix)\n"
    )
    for _ in range(2):  # with a session folder in common, the second node would have deleted the first one's files
        with jobs.job_client(None) as client:
            job = client.submit_job(entrypoint="python job.py", runtime_env={"working_dir": str(tmp_path)})
            while (state := client.get_job_status(job).value) not in jobs.ENDED:
                time.sleep(0.2)
            said = client.get_job_logs(job)
        assert state == "SUCCEEDED", said
        assert f"[True, True] {sys.prefix}" in said


def test_the_local_cluster_is_not_started_twice_and_ends_alone() -> None:
    with local_cluster() as cluster:
        env = clean_environ() | {"RAYMASK_LOCAL_CLUSTER": str(cluster.folder), "PORT": "1", "DASHBOARD_PORT": "2"}
        again = subprocess.run([SCRIPTS / "up"], env=env, capture_output=True, text=True, timeout=60)
        assert (again.returncode, again.stdout) == (2, "")
        assert "is it up already?" in again.stderr
        bystander = subprocess.Popen(["sleep", "100"], cwd=cluster.folder, env=cluster.environ)
        submit = ["ray", "job", "submit", "--no-wait", "--", "sleep", "100"]
        subprocess.run(submit, env=cluster.environ, capture_output=True, check=True, timeout=60)
        deadline = time.monotonic() + 60
        while not any("sleep" in process.name() for process in ours(cluster.folder)):
            assert time.monotonic() < deadline, "the job does not start"
            time.sleep(0.2)
        started = ours(cluster.folder)
    try:
        assert len(started) > 10
        assert not [process for process in started if process.is_running() and process.status() != "zombie"]
        assert not cluster.folder.exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
