"""Workers on a real Ray: the same bits as in one process, and a private Ray that nobody else sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from support.builders import refused, run_halving, tiny_context, tiny_snapshot
from support.callbacks import (
    PATIENCE,
    RecordingCallback,
    assert_same,
    by_place,
    family,
    pid_of,
    result,
    wait_until,
    worker_pids,
)

from raymask.core.callbacks import Callback
from raymask.core.errors import UserError
from raymask.core.recipe import finetune_config, propose_candidates, resolve
from raymask.core.records import Candidate, Evaluation
from raymask.core.tasks import Checkpoint, FinetuneTask, Snapshot
from raymask.core.tensors import pack
from raymask.executor import actor_pool, local_executor, ray_executor

import psutil  # isort: skip - Ray brings it along, so it is found once Ray is imported

RUNGS = [0.75, 1.0]  # by which all of so small a pool go on
JOB = tiny_context(early_eval={"epochs": 4.0, "score_window": 2, "rungs": RUNGS}, workers={"cpus": 0.5})
STAGE = finetune_config(resolve(JOB.spec), 1)


@pytest.fixture(scope="module")
def parent() -> Snapshot:
    return tiny_snapshot(JOB)


@pytest.fixture(scope="module")
def pool() -> tuple[Candidate, ...]:
    return propose_candidates(resolve(JOB.spec), 1)


@pytest.fixture(scope="module")
def work(parent: Snapshot, pool: tuple[Candidate, ...]) -> list[tuple[Snapshot, FinetuneTask]]:
    """Two masks to fine-tune, by four shards of a batch: a random one and the magnitude mask."""
    stage = STAGE.model_copy(update={"data_parallel": 4})
    return [
        (parent, FinetuneTask("selected (candidate 1)", pool[1], stage, None)),
        (parent, FinetuneTask("IMP", pool[0], stage, None)),
    ]


@dataclass(frozen=True)
class Alone:
    """What one process finds, without Ray."""

    evaluations: dict[tuple[int, int], Evaluation]
    checkpoints: dict[int, Checkpoint]


@pytest.fixture(scope="module")
def alone(parent: Snapshot, pool: tuple[Candidate, ...], work: list[tuple[Snapshot, FinetuneTask]]) -> Alone:
    with local_executor.LocalExecutor(JOB, Callback()) as executor:
        return Alone(by_place(run_halving(executor, parent, pool, RUNGS)), dict(executor.finetune(work)))


@dataclass(frozen=True)
class Seams:
    """An executor on the shared Ray, with two workers that are kept from test to test."""

    executor: ray_executor.RayExecutor
    ear: RecordingCallback = field(default_factory=RecordingCallback)


@pytest.fixture(scope="module")
def seams(one_cpu: None) -> Iterator[Seams]:
    ear = RecordingCallback()
    with ray_executor.RayExecutor(JOB, ear, None) as executor:
        yield Seams(executor, ear)


def test_two_workers_share_a_cpu_and_find_bitwise_what_one_process_finds(
    seams: Seams, parent: Snapshot, pool: tuple[Candidate, ...], alone: Alone
) -> None:
    forwards = list(run_halving(seams.executor, parent, pool, RUNGS))
    wait_until(lambda: len(worker_pids()) == 2)  # each takes half of the only CPU
    assert {pid_of(evaluation) for evaluation in forwards} <= set(worker_pids())
    assert all(evaluation.worker.endswith("cpu 1 threads fp32") for evaluation in forwards)
    assert by_place(forwards) == alone.evaluations
    assert by_place(run_halving(seams.executor, parent, pool[::-1], RUNGS)) == alone.evaluations
    assert len(alone.evaluations) == 2 * len(pool)
    assert all(evaluation.ok for evaluation in alone.evaluations.values())


def test_workers_that_would_stand_idle_share_a_fine_tuning_and_change_no_bit_of_it(
    seams: Seams, work: list[tuple[Snapshot, FinetuneTask]], alone: Alone
) -> None:
    undivided = [(start, replace(finetune_task, config=STAGE)) for start, finetune_task in work]
    both = dict(seams.executor.finetune(work))
    backwards = dict(seams.executor.finetune(work[::-1]))
    one = dict(seams.executor.finetune(work[:1]))
    single = dict(seams.executor.finetune(undivided[:1]))
    found = [both[0], both[1], backwards[1], backwards[0], one[0]]
    assert [len(checkpoint.finetune_result.helper_workers) for checkpoint in (*found, single[0])] == [0, 0, 0, 0, 1, 0]
    for checkpoint, index in zip(found, [0, 1, 0, 1, 0], strict=True):
        assert_same(checkpoint, alone.checkpoints[index])
    with local_executor.LocalExecutor(JOB, Callback()) as executor:
        assert_same(single[0], dict(executor.finetune(undivided[:1]))[0])


def test_weights_are_put_once_a_snapshot_and_workers_are_kept(
    seams: Seams, pool: tuple[Candidate, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[object] = []
    put = ray.put

    def counting(value: object, *args: Any, **kwargs: Any) -> Any:
        puts.append(value)
        return put(value, *args, **kwargs)

    parent = tiny_snapshot(JOB, seed=1)
    before = worker_pids()
    monkeypatch.setattr(ray, "put", counting)
    first = list(run_halving(seams.executor, parent, pool, RUNGS))
    assert puts == [parent.weights]
    checkpoints = dict(seams.executor.finetune([(parent, FinetuneTask("selected", pool[1], STAGE, None))]))
    assert len(puts) == 1
    child = Snapshot("search-1", checkpoints[0].weights, checkpoints[0].optimizer)
    second = list(run_halving(seams.executor, child, propose_candidates(resolve(JOB.spec), 2), RUNGS))
    list(run_halving(seams.executor, child, pool[:1], RUNGS))
    assert puts == [parent.weights, child.weights, child.optimizer]
    assert sorted(worker_pids()) == sorted(before)
    assert {pid_of(evaluation) for evaluation in [*first, *second]} <= set(before)


def test_a_candidates_own_failure_is_recorded_and_costs_no_worker(
    seams: Seams, parent: Snapshot, pool: tuple[Candidate, ...], alone: Alone
) -> None:
    tensors = {name: view.clone() for name, view in parent.weights.views().items()}
    tensors["classifier.bias"][0] = float("nan")
    before = worker_pids()
    broken = list(run_halving(seams.executor, Snapshot("poisoned", pack(tensors)), pool[:1], RUNGS))
    assert ["the loss on validation is nan" in str(evaluation.error) for evaluation in broken] == [True]
    assert not broken[0].system_failure
    good = list(run_halving(seams.executor, parent, pool[:1], RUNGS))
    assert result(good[0]) == alone.evaluations[0, 0]
    assert sorted(worker_pids()) == sorted(before)
    assert seams.ear.troubles == []


def test_the_callback_sees_progress_rise(
    seams: Seams, work: list[tuple[Snapshot, FinetuneTask]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_pool, "POLL_INTERVAL_S", 0.05)
    start, finetune_task = work[0]
    longer = replace(finetune_task, name="longer", config=STAGE.model_copy(update={"epochs": 40.0}))
    list(seams.executor.finetune([(start, longer)]))
    told = [shares["longer"] for shares in seams.ear.shares if "longer" in shares]
    assert told == sorted(told)
    assert len(set(told)) > 2
    assert 0.0 <= told[0] < told[-1] <= 1.0


def test_a_mistake_that_a_group_finds_is_told_once_and_as_it_is(
    seams: Seams, work: list[tuple[Snapshot, FinetuneTask]]
) -> None:
    """Here both workers end, so this is the last test that uses them."""
    start, finetune_task = work[0]
    with pytest.raises(UserError, match=r"candidate 1 of level 1 drew mask .*, but mask 0{32} was scored") as told:
        list(seams.executor.finetune([(start, replace(finetune_task, digest="0" * 32))]))
    wait_until(lambda: not worker_pids())
    assert told  # which still holds the error and all that it knows, so nothing has ended for being forgotten


@pytest.mark.parametrize(
    ("asked", "said"), [({"gpus": 1}, "one asks for 1 CPUs, 1 GPUs"), ({"cpus": 1000}, "one asks for 1000 CPUs")]
)
def test_more_than_any_node_has_is_refused_at_once(one_cpu: None, asked: dict[str, Any], said: str) -> None:
    if ray.cluster_resources().get("GPU", 0) and "gpus" in asked:
        pytest.skip("there is a GPU here")
    told = refused(ray_executor.RayExecutor(tiny_context(workers=asked), RecordingCallback(), None).__enter__)
    assert f"no node can hold a worker: {said}" in told
    assert "the nodes have 1 CPUs, " in told


def test_the_private_ray_listens_on_loopback_only(one_cpu: None) -> None:
    heard = set()
    for process in [psutil.Process(), *family()]:
        with suppress(psutil.NoSuchProcess):
            ends = process.net_connections(kind="tcp")
            heard |= {f"{process.name()} {end.laddr.ip}" for end in ends if end.status == psutil.CONN_LISTEN}
    assert len(heard) > 2
    open_to_others = {ear for ear in heard if ear.split()[-1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")}
    assert open_to_others == set()


def test_the_private_ray_turns_away_whoever_lacks_its_token(one_cpu: None, tmp_path: Path) -> None:
    [server] = [process for process in psutil.Process().children() if process.name() == "gcs_server"]
    assert server.environ()["RAY_AUTH_MODE"] == "token"
    code = "import sys; from ray._raylet import GcsClient; GcsClient(sys.argv[1]).internal_kv_keys(b'', None)"
    address = ray.get_runtime_context().gcs_address
    for theirs in [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]:
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            env=clean_environment(tmp_path) | theirs,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode != 0
        assert "AuthenticationError" in done.stderr


def test_a_private_ray_leaves_nothing_behind() -> None:
    code = """
import json, os
from pathlib import Path
from types import SimpleNamespace
import ray, psutil
from raymask.executor import connection
job = SimpleNamespace(spec=SimpleNamespace(workers=SimpleNamespace(threads=1)), config=Path())
mine = f"{connection.SESSION_PREFIX}{os.getpid()}-*"
folders = lambda: sorted(str(path) for path in Path(connection.RAY_DIR).glob(mine))
before = dict(os.environ)
with connection.ray_connection(job, None):
    during = folders()
    processes = psutil.Process().children(recursive=True)
after = dict(os.environ)
gone, alive = psutil.wait_procs(processes, timeout=30)
print(json.dumps({
    "during": during,
    "processes": len(processes),
    "folders": folders(),
    "alive": [process.name() for process in alive],
    "environment": sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)),
    "home": sorted(os.listdir(Path.home())),
}))
"""
    with tempfile.TemporaryDirectory(prefix="rm-", ignore_cleanup_errors=True) as folder:  # short enough for sockets
        home = Path(folder) / "home"
        home.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=clean_environment(home) | {"TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["during"]) == 1
    assert found["processes"] > 3
    assert found["folders"] == []
    assert found["alive"] == []
    assert ".ray" not in found["home"]
    assert found["environment"] == []


def clean_environment(home: Path) -> dict[str, str]:
    """This process's environment with another home, and without Ray's variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
