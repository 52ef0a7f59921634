"""Do the two seams on Ray do what one process does, and what happens when workers, nodes and candidates fail?"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from support.builders import climbed
from support.watch import Ear

from raymask.config import make_spec
from raymask.core.errors import UserError
from raymask.core.recipe import finetune_stage, propose, resolve
from raymask.core.records import Candidate, Checkpoint, Evaluate, Evaluation, FineTune, Settling, Snapshot
from raymask.core.rungs import Ladder
from raymask.core.tensors import pack
from raymask.driver import cluster, local, remote
from raymask.driver.search import Plan, prepare
from raymask.report.terminal import Silent
from raymask.train.worker import Job

import psutil  # isort: skip - Ray brings it along, so it is found once Ray is imported

pytestmark = [pytest.mark.ray, pytest.mark.long]

SHORT = {"epochs": 0.1, "batch_size": 32, "eval_every": 5, "last": 2}
LONG = SHORT | {"epochs": 1.0, "eval_every": 50}
BASE = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5, 0.9],
    "candidates": {"count": 3, "ratios": [0.02]},
    "probe": SHORT,
    "finetune": {"epochs": 0.1, "batch_size": 32},
    "distill": False,
    "precision": "fp32",
    "workers": {"count": 2},
}
PATIENCE = 60.0  # seconds after which something that must happen counts as never happening


@dataclass
class Killer(Ear):
    """Signals the workers, or `together` of them, in the middle of `name`, a number of `times`, each a new process."""

    name: str = "candidate 1"
    times: int = 1
    together: int | None = None
    signal: int = signal.SIGKILL
    hit: list[int] = field(default_factory=list)

    def running(self, shares: Mapping[str, float]) -> None:
        super().running(shares)
        noticed = not self.together or len(self.hit) <= len(self.troubles)  # else its partners are still there
        if shares.get(self.name, 0.0) > 0.0 and len(self.hit) < self.times and noticed:
            for pid in [pid for pid in desks() if pid not in self.hit][: self.together]:
                os.kill(pid, self.signal)
                self.hit.append(pid)


def family() -> list[psutil.Process]:
    """The processes that this one has started, and theirs."""
    return psutil.Process().children(recursive=True)


def desks() -> list[int]:
    """Process ids of the actors of Ray that this process has started."""
    found = []
    for process in family():
        with suppress(psutil.NoSuchProcess, IndexError):
            if process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[0].startswith("ray::Desk"):
                found.append(process.pid)
    return found


def wait_until(happened: Callable[[], object]) -> None:
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < PATIENCE, "waited too long"
        time.sleep(0.05)


def job_of(plan: Plan, **changes: object) -> Job:
    return replace(plan.job, spec=make_spec({**BASE, **changes}))


@contextmanager
def hired(job: Job, watch: Ear | None = None) -> Iterator[tuple[Evaluate, FineTune]]:
    """The seams on the Ray that runs already, when the workers of the test before are gone."""
    wait_until(lambda: not desks())
    with remote.workers(job, watch or Ear(), None) as seams:
        yield seams


def result(evaluation: Evaluation) -> Evaluation:
    """What must not depend on where and how fast it was computed."""
    return evaluation.model_copy(update={"started": 0.0, "seconds": 0.0, "worker": ""})


def by_index(evaluations: Iterator[Evaluation]) -> dict[int, Evaluation]:
    found = {}
    for evaluation in evaluations:
        assert evaluation.candidate.index not in found
        found[evaluation.candidate.index] = result(evaluation)
    return found


def pid_of(evaluation: Evaluation) -> int:
    return int(evaluation.worker.split()[0].split("/")[1])


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for mine, theirs in [
        (one.weights, other.weights),
        (one.optimizer, other.optimizer),
        (one.mask, other.mask),
    ]:
        assert mine.index == theirs.index
        assert np.array_equal(mine.buffer, theirs.buffer)
    assert (one.digest, one.kept, one.total) == (other.digest, other.kept, other.total)
    assert (one.finetuned.curve, one.finetuned.best) == (other.finetuned.curve, other.finetuned.best)
    assert np.array_equal(one.logits, other.logits)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return prepare(make_spec(BASE))


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]) -> dict[int, Evaluation]:
    """What one process finds, alone."""
    with local.workers(plan.job, Silent()) as (evaluate, _):
        return by_index(climbed(evaluate, parent, pool))


@pytest.fixture(scope="module")
def work(plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]) -> list[tuple[Snapshot, Settling]]:
    """Two masks to fine-tune: a random one and the control."""
    stage = finetune_stage(resolve(plan.job.spec), 1)
    return [
        (parent, Settling("selected (candidate 1)", pool[1], stage, None)),
        (parent, Settling("control (IMP)", pool[0], stage, None)),
    ]


@pytest.fixture(scope="module")
def ours(plan: Plan) -> Iterator[None]:
    """The private Ray of a search, for the tests that need no other; those that do come before its first use."""
    with cluster.connected(plan.job, None):
        yield


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that looks more often, so that a short probe has a middle."""
    monkeypatch.setattr(remote, "POLL", 0.05)


# ---------------------------------------------------------------- several nodes: before the private Ray of the others


NODE = {"include_dashboard": False, "object_store_memory": 2**27}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, short_folder: Path) -> Iterator[Any]:
    """A cluster without nodes: `add_node`, each with a `temp_dir` of its own; the first one is the head."""
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized(), "these tests come before those that share a private Ray"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    (short_folder / "ray").mkdir()
    cluster.reread_environment()
    found = Cluster()
    yield found
    found.shutdown()


@pytest.mark.faults
def test_a_late_node_gets_work_and_its_loss_is_survived(
    plan: Plan, parent: Snapshot, nodes: Any, short_folder: Path
) -> None:
    nodes.add_node(**NODE, num_cpus=1, temp_dir=str(short_folder / "0"))
    job = job_of(plan, candidates={"count": 40, "ratios": [0.02]}, workers={"retries": 5}, probe=LONG)
    pool, ear, found = propose(resolve(job.spec), 1), Ear(), {}
    head = elsewhere = late = killed = None
    with cluster.connected(job, nodes.address), remote.workers(job, ear, nodes.address) as (evaluate, _):
        for evaluation in climbed(evaluate, parent, pool):
            found[evaluation.candidate.index] = evaluation
            pid = pid_of(evaluation)
            if late is None:
                head = pid
                late = nodes.add_node(**NODE, num_cpus=1, temp_dir=str(short_folder / "1"))
            elif pid != head:
                elsewhere = elsewhere or pid
            elif elsewhere and not killed:  # it is in the middle of its next candidate
                [raylet] = [info.process.pid for info in late.all_processes["raylet"]]
                assert elsewhere in {child.pid for child in psutil.Process(raylet).children(recursive=True)}
                os.kill(raylet, signal.SIGKILL)
                killed = raylet
    assert killed is not None, "the late node got no work"
    assert sorted(found) == [candidate.index for candidate in pool]
    assert all(evaluation.ok for evaluation in found.values())
    assert any("its worker was lost" in note for note in ear.troubles)


@pytest.mark.faults
def test_a_search_waits_for_a_cluster_to_grow_as_long_as_it_is_told_to(
    plan: Plan, parent: Snapshot, nodes: Any, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an autoscaler would do is done here when the search says that it waits."""
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    nodes.add_node(**NODE, num_cpus=0, temp_dir=str(short_folder / "0"))

    class Grower(Ear):
        def note(self, text: str) -> None:
            super().note(text)
            if text.startswith("waiting for the cluster") and len(ray.nodes()) == 1:
                demand.extend(actors_in_want())
                nodes.add_node(**NODE, num_cpus=1, temp_dir=str(short_folder / "1"))

    demand: list[Any] = []
    ear, pool = Grower(), propose(resolve(plan.job.spec), 1)
    with cluster.connected(plan.job, nodes.address):
        with pytest.raises(UserError, match=r"no node can hold a worker.*the nodes have 0 CPUs.*workers\.wait"):
            remote.workers(plan.job, Ear(), nodes.address).__enter__()
        with remote.workers(job_of(plan, workers={"wait": 60}), ear, nodes.address) as (evaluate, _):
            assert all(evaluation.ok for evaluation in climbed(evaluate, parent, pool))
        note, *_ = [text for text in ear.notes if text.startswith("waiting for the cluster")]
        assert "a worker asks for 1 CPUs, 0 GPUs" in note
        assert len(demand) == len(pool), "an autoscaler sees no demand"
        with (
            remote.workers(job_of(plan, workers={"wait": 2, "cpus": 8}), Ear(), nodes.address) as (evaluate, _),
            pytest.raises(UserError, match=r"no node can hold a worker: one asks for 8 CPUs"),
        ):
            list(climbed(evaluate, parent, pool))


@pytest.mark.faults
def test_weights_that_are_lost_with_their_node_are_put_again(
    plan: Plan,
    parent: Snapshot,
    pool: tuple[Candidate, ...],
    undisturbed: dict[int, Evaluation],
    nodes: Any,
    short_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One node has the only copy, its owner and the only worker; another has joined when it is killed."""

    class Holder:
        def hold(self, value: object) -> list[Any]:
            self.held = ray.put(value)
            return [self.held]

    nodes.add_node(**NODE, num_cpus=0, temp_dir=str(short_folder / "0"))
    lost = nodes.add_node(**NODE, num_cpus=1, resources={"holder": 1}, temp_dir=str(short_folder / "1"))
    puts: list[Any] = []
    put, ear, found = ray.put, Ear(), {}

    def elsewhere(value: object, *args: Any, **kwargs: Any) -> Any:
        puts.append(put(value, *args, **kwargs) if puts else ray.get(holder.hold.remote(value))[0])
        return puts[-1]

    with cluster.connected(plan.job, nodes.address), remote.workers(plan.job, ear, nodes.address) as (evaluate, _):
        holder = ray.remote(num_cpus=0, resources={"holder": 1})(Holder).remote()
        monkeypatch.setattr(ray, "put", elsewhere)
        for evaluation in climbed(evaluate, parent, pool):
            found[evaluation.candidate.index] = result(evaluation)
            if len(found) == 1:
                nodes.add_node(**NODE, num_cpus=1, temp_dir=str(short_folder / "2"))
                [raylet] = [info.process.pid for info in lost.all_processes["raylet"]]
                os.kill(raylet, signal.SIGKILL)
    assert len(puts) == 2
    assert any("its worker was lost" in note for note in ear.troubles)
    assert found == undisturbed


def actors_in_want() -> list[Any]:
    """Resource demands that an autoscaler would read."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return [demand for demand in status.resource_demands.ray_task_actor_demand for _ in range(count_of(demand))]


def count_of(demand: Any) -> int:
    return sum(bundle.count for bundle in demand.bundles_by_count)


def test_an_address_where_nothing_answers_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = """
import sys
from raymask.driver import cluster
from raymask.core.errors import UserError
try:
    with cluster.connected(None, sys.argv[1]):
        print("connected")
except UserError as error:
    print("UserError", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, address],
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE,  # Ray alone asks 20 times, for 14 minutes
        check=True,
    )
    assert done.stdout.startswith(f"UserError --address {address}: no Ray cluster answers there")


def test_a_private_ray_leaves_nothing_behind(short_folder: Path) -> None:
    code = """
import json, os
from pathlib import Path
import ray, psutil
from raymask.driver import cluster
from raymask.config import make_spec
from raymask.driver.search import prepare
job = prepare(make_spec({"model": "quickstart", "task": "quickstart"})).job
folders = lambda: sorted(str(path) for path in Path(cluster.ROOT).glob(f"{cluster.FOLDER}{os.getpid()}-*"))
before = dict(os.environ)
with cluster.connected(job, None):
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
    (short_folder / "home").mkdir()
    environment = clean_environment(short_folder / "home") | {"TMPDIR": str(short_folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=2 * PATIENCE, check=True
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


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name is short enough for the sockets that Ray puts into it."""
    with tempfile.TemporaryDirectory(prefix="rm-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


# ------------------------------------------------------------------------------------------ one private Ray for all


@pytest.mark.parametrize("count", [1, 2])
def test_workers_on_ray_find_bitwise_what_one_process_finds(
    ours: None,
    plan: Plan,
    parent: Snapshot,
    pool: tuple[Candidate, ...],
    undisturbed: dict[int, Evaluation],
    work: list[tuple[Snapshot, Settling]],
    count: int,
) -> None:
    with local.workers(plan.job, Silent()) as (_, fine_tune):
        alone = dict(fine_tune(work))
    with hired(job_of(plan, workers={"count": count})) as (evaluate, fine_tune):
        assert by_index(climbed(evaluate, parent, pool)) == undisturbed
        assert by_index(climbed(evaluate, parent, pool[::-1])) == undisturbed
        tuned = dict(fine_tune(work))
        backwards = dict(fine_tune(work[::-1]))
    assert all(evaluation.ok for evaluation in undisturbed.values())
    for index in range(2):
        assert_same(tuned[index], alone[index])
        assert_same(backwards[1 - index], alone[index])


@pytest.mark.faults
def test_rungs_are_climbed_on_ray_as_in_one_process_also_when_a_worker_dies(
    ours: None, attentive: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    rungs = [0.25, 0.5, 1.0]

    def finalists(job: Job, evaluate: Evaluate) -> list[Evaluation]:
        ladder = Ladder(pool, job.spec.probe.rungs)
        done = list(ladder.climb(evaluate, {1: parent}))
        assert len({(evaluation.candidate, evaluation.rung) for evaluation in done}) == len(done)
        return [result(evaluation) for evaluation in ladder.finalists()]

    job = job_of(plan, workers={"count": 2}, probe=LONG | {"rungs": rungs})
    with local.workers(job, Silent()) as (evaluate, _):
        expected = finalists(job, evaluate)
    assert {evaluation.rung for evaluation in expected} == {2}
    with hired(job) as (evaluate, _):
        assert finalists(job, evaluate) == expected
    killer = Killer(name="control", times=2)
    with hired(job_of(plan, workers={"count": 1}, probe=LONG | {"rungs": rungs}), killer) as (evaluate, _):
        assert finalists(job, evaluate) == expected
    assert len(killer.hit) == 2


def test_what_is_lost_with_its_node_is_done_again_from_the_parent(ours: None) -> None:
    class Owner:
        def put(self) -> list[Any]:
            return [ray.put(np.zeros(10**6))]

    owner = ray.remote(num_cpus=0)(Owner).remote()
    kept, [lost] = ray.put("paused"), ray.get(owner.put.remote())
    ray.kill(owner)
    assert remote.still_there([]) is None
    assert remote.still_there([kept]) == "paused"
    wait_until(lambda: remote.still_there([lost]) is None)


@pytest.mark.faults
def test_a_worker_killed_in_the_middle_of_a_probe_is_replaced_and_the_probe_repeated(
    ours: None, attentive: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    job, killer = job_of(plan, workers={"count": 1}, probe=LONG), Killer()
    with local.workers(job, Silent()) as (evaluate, _):
        expected = by_index(climbed(evaluate, parent, pool[:3]))
    with hired(job, killer) as (evaluate, _):
        assert by_index(climbed(evaluate, parent, pool[:3])) == expected
    assert len(killer.hit) == 1
    [note] = killer.troubles
    assert note.startswith("candidate 1: its worker was lost")
    assert note.endswith("trying again elsewhere")


@pytest.mark.faults
def test_a_candidate_whose_workers_die_again_and_again_is_recorded_and_the_others_go_on(
    ours: None,
    attentive: None,
    plan: Plan,
    parent: Snapshot,
    pool: tuple[Candidate, ...],
) -> None:
    killer = Killer(times=2)
    with hired(job_of(plan, workers={"count": 1, "retries": 1}, probe=LONG), killer) as (evaluate, _):
        found = by_index(climbed(evaluate, parent, pool[:3]))
    assert len(killer.hit) == 2
    assert sorted(found) == [0, 1, 2]
    assert (found[0].ok, found[1].ok, found[2].ok) == (True, False, True)
    assert "its workers failed 2 times; the last one: " in str(found[1].error)
    assert found[1].score is None


@pytest.mark.faults
def test_a_worker_killed_in_the_middle_of_a_fine_tuning_is_replaced(
    ours: None, attentive: None, plan: Plan, work: list[tuple[Snapshot, Settling]]
) -> None:
    longer = [(start, replace_stage(settling, epochs=1.0)) for start, settling in work]
    with local.workers(plan.job, Silent()) as (_, fine_tune):
        expected = dict(fine_tune(longer))
    killer = Killer(name="control (IMP)")
    with hired(job_of(plan, workers={"count": 1}), killer) as (_, fine_tune):
        found = dict(fine_tune(longer))
    assert len(killer.hit) == 1
    assert any(note.startswith("control (IMP): its worker was lost") for note in killer.notes)
    for index in range(2):
        assert_same(found[index], expected[index])


def test_a_fine_tuning_that_may_not_be_repeated_ends_the_search_and_says_which(
    ours: None, attentive: None, plan: Plan, work: list[tuple[Snapshot, Settling]]
) -> None:
    longer = [(start, replace_stage(settling, epochs=1.0)) for start, settling in work]
    killer = Killer(name="control (IMP)")
    with (
        hired(job_of(plan, workers={"count": 1, "retries": 0}), killer) as (_, fine_tune),
        pytest.raises(UserError, match=r"control \(IMP\): its workers failed 1 times.*same command goes on from here"),
    ):
        list(fine_tune(longer))
    assert len(killer.hit) == 1


@pytest.mark.parametrize("shards", [1, 4])
def test_workers_that_would_stand_idle_share_a_fine_tuning_and_change_no_bit_of_it(
    ours: None, plan: Plan, work: list[tuple[Snapshot, Settling]], shards: int
) -> None:
    work = [(start, replace_stage(settling, shards=shards)) for start, settling in work]
    with local.workers(plan.job, Silent()) as (_, fine_tune):
        expected = dict(fine_tune(work))
    with hired(job_of(plan, workers={"count": 2})) as (_, fine_tune):
        both = dict(fine_tune(work))
        one = dict(fine_tune(work[:1]))
    helpers = [len(found.finetuned.helpers) for found in (both[0], both[1], one[0])]
    assert helpers == [0, 0, 1 if shards > 1 else 0]
    for found, wanted in [(both[0], expected[0]), (both[1], expected[1]), (one[0], expected[0])]:
        assert_same(found, wanted)


@pytest.mark.faults
def test_a_gang_that_loses_a_member_is_replaced_as_a_whole(
    ours: None, attentive: None, plan: Plan, work: list[tuple[Snapshot, Settling]]
) -> None:
    longer = [(start, replace_stage(settling, epochs=1.0, shards=2)) for start, settling in work[:1]]
    with local.workers(plan.job, Silent()) as (_, fine_tune):
        [(_, expected)] = fine_tune(longer)
    name = longer[0][1].name
    killer = Killer(name=name, times=2, together=1)
    with hired(job_of(plan, workers={"count": 2}), killer) as (_, fine_tune):
        [(_, found)] = fine_tune(longer)
    assert len(killer.hit) == 2
    assert [note.partition(":")[0] for note in killer.troubles] == [name, name]
    assert len(found.finetuned.helpers) == 1
    assert_same(found, expected)


def test_a_mistake_that_a_gang_finds_is_told_once_and_as_it_is(
    ours: None, plan: Plan, work: list[tuple[Snapshot, Settling]]
) -> None:
    wrong = [(start, replace(replace_stage(settling, shards=2), digest="0" * 32)) for start, settling in work[:1]]
    with (
        hired(job_of(plan, workers={"count": 2})) as (_, fine_tune),
        pytest.raises(UserError, match=r"candidate 1 of level 1 drew mask .*, but mask 0{32} was scored") as told,
    ):
        list(fine_tune(wrong))
    wait_until(lambda: not desks())
    assert told  # which still holds the error and all that it knows, so nothing has ended for being forgotten


GANG = {"cpus": 0.5, "count": 1, "gang": 2}


@pytest.mark.faults
def test_a_worker_may_be_a_gang_that_holds_a_model_in_parts(
    ours: None, attentive: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    """The same masks, to rounding the same scores where nothing drops out; and whoever loses a member ends."""
    config = copy.deepcopy(plan.job.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    job = replace(job_of(plan, workers=GANG, probe=LONG), config=config)
    with local.workers(job, Silent()) as (evaluate, _):
        expected = by_index(climbed(evaluate, parent, pool[:2]))
    killer = Killer(times=1, together=1)
    with hired(job, killer) as (evaluate, fine_tune):
        found = by_index(climbed(evaluate, parent, pool[:2]))
        settling = Settling("selected", pool[1], finetune_stage(resolve(job.spec), 1), expected[1].digest)
        [(_, checkpoint)] = fine_tune([(parent, settling)])
    assert len(killer.hit) == 1
    assert [note.partition(":")[0] for note in killer.troubles] == ["candidate 1"]
    for index, evaluation in found.items():
        assert evaluation.ok
        assert evaluation.digest == expected[index].digest
        assert evaluation.score == pytest.approx(expected[index].score, rel=1e-2)
    assert checkpoint.digest == expected[1].digest
    assert checkpoint.finetuned.helpers == ()


def replace_stage(settling: Settling, **changes: object) -> Settling:
    return replace(settling, stage=settling.stage.model_copy(update=changes))


@pytest.mark.faults
def test_workers_that_died_while_idle_are_nobodys_fault(
    ours: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...], undisturbed: dict[int, Evaluation]
) -> None:
    with hired(job_of(plan, workers={"count": 2, "retries": 1})) as (evaluate, _):
        pids = {pid_of(evaluation) for evaluation in climbed(evaluate, parent, pool)}
        wait_until(lambda: len(desks()) == 2)
        idle = desks()
        assert pids <= set(idle)
        for pid in idle:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not set(idle) & set(desks()))
        assert by_index(climbed(evaluate, parent, pool[:1])) == {0: undisturbed[0]}


@pytest.mark.faults
def test_a_candidate_past_its_deadline_is_recorded_and_the_others_get_a_fresh_worker(
    ours: None,
    attentive: None,
    plan: Plan,
    parent: Snapshot,
    pool: tuple[Candidate, ...],
) -> None:
    killer = Killer(signal=signal.SIGSTOP)  # from here on the candidate makes no step any more
    job = job_of(plan, workers={"count": 1, "deadline": 10}, probe=LONG)
    try:
        with hired(job, killer) as (evaluate, _):
            evaluations = list(climbed(evaluate, parent, pool[:3]))
    finally:
        for pid in killer.hit:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)
    [stopped] = killer.hit
    found = {evaluation.candidate.index: evaluation for evaluation in evaluations}
    assert sorted(found) == [0, 1, 2]
    assert found[1].error == "took longer than the deadline of 10 s (workers.deadline)"
    assert found[0].ok
    assert found[2].ok
    assert pid_of(found[0]) == stopped != pid_of(found[2])
    assert killer.troubles == []


@pytest.mark.faults
def test_every_candidate_has_its_own_deadline(
    ours: None, attentive: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    endless = job_of(plan, workers={"count": 2, "deadline": 0.5}, probe=SHORT | {"epochs": 1000.0})
    with hired(endless) as (evaluate, _):
        found = by_index(climbed(evaluate, parent, pool[:3]))
    assert {evaluation.error for evaluation in found.values()} == {
        "took longer than the deadline of 0.5 s (workers.deadline)"
    }
    assert sorted(found) == [0, 1, 2]


def test_a_candidates_own_failure_is_recorded_and_not_repeated(
    ours: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...], undisturbed: dict[int, Evaluation]
) -> None:
    tensors = {name: view.clone() for name, view in parent.weights.views().items()}
    tensors["classifier.bias"][0] = float("nan")
    ear = Ear()
    with hired(job_of(plan, workers={"count": 1}), ear) as (evaluate, _):
        broken = list(climbed(evaluate, Snapshot("poisoned", pack(tensors)), pool[:2]))
        assert all("the loss on select is nan" in str(evaluation.error) for evaluation in broken)
        assert len({pid_of(evaluation) for evaluation in broken}) == 1
        good = list(climbed(evaluate, parent, pool[:1]))
    assert result(good[0]) == undisturbed[0]
    assert pid_of(good[0]) == pid_of(broken[0])
    assert ear.troubles == []


@pytest.mark.parametrize(
    ("asked", "said"), [({"gpus": 1}, "one asks for 1 CPUs, 1 GPUs"), ({"cpus": 1000}, "one asks for 1000 CPUs")]
)
def test_more_than_any_node_has_is_refused_at_once(ours: None, plan: Plan, asked: dict[str, Any], said: str) -> None:
    if ray.cluster_resources().get("GPU", 0) and "gpus" in asked:
        pytest.skip("there is a GPU here")
    cpus = ray.cluster_resources()["CPU"]
    with (
        pytest.raises(UserError, match=rf"no node can hold a worker: {said}.*the nodes have {cpus:g} CPUs, "),
        remote.workers(job_of(plan, workers=asked), Ear(), None),
    ):
        pass


@pytest.mark.faults
def test_workers_that_cannot_start_end_the_search_with_the_last_reason(
    ours: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STARTS", 2)
    nothing_known = replace(job_of(plan, workers={"count": 1}), config=dict)
    ear = Ear()
    with (
        hired(nothing_known, ear) as (evaluate, _),
        pytest.raises(UserError, match=r"2 workers in a row did not start; the last one said: .*"),
    ):
        list(climbed(evaluate, parent, pool))
    assert len(ear.troubles) == 2
    assert all("TypeError: cannot set 'use_cache'" in note for note in ear.troubles), ear.troubles


def test_weights_are_put_once_a_snapshot_and_workers_are_kept(
    ours: None,
    plan: Plan,
    parent: Snapshot,
    pool: tuple[Candidate, ...],
    work: list[tuple[Snapshot, Settling]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    puts: list[object] = []
    put = ray.put

    def counting(value: object, *args: Any, **kwargs: Any) -> Any:
        puts.append(value)
        return put(value, *args, **kwargs)

    with hired(plan.job) as (evaluate, fine_tune):
        monkeypatch.setattr(ray, "put", counting)
        first = list(climbed(evaluate, parent, pool))
        assert sum(value is parent.weights for value in puts) == len(puts) == 1
        wait_until(lambda: len(desks()) == 2)
        workers = desks()
        checkpoints = dict(fine_tune(work))
        list(climbed(evaluate, parent, pool))
        assert len(puts) == 1
        child = Snapshot("search-1", checkpoints[0].weights, checkpoints[0].optimizer)
        second = list(climbed(evaluate, child, propose(resolve(plan.job.spec), 2)))
        assert len(puts) == 3
        list(climbed(evaluate, child, pool[:1]))
        assert len(puts) == 3
        assert sorted(desks()) == sorted(workers)
    assert {pid_of(evaluation) for evaluation in [*first, *second]} <= set(workers)


def test_the_store_lets_go_of_weights_with_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "put", lambda packed: f"a reference to {packed.index}")
    pool = object.__new__(remote.Pool)
    pool.watch, pool.shelf = Ear(), {}
    snapshot = Snapshot("first", pack({"w": torch.ones(3)}), pack({"step": torch.ones(())}))
    refs = pool.put(snapshot)
    assert set(refs) == {"weights", "optimizer"}
    assert pool.put(Snapshot("second", snapshot.weights)) == {"weights": refs["weights"]}
    assert len(pool.shelf) == 2
    del snapshot
    assert pool.shelf == {}


def test_what_travels_for_a_candidate_is_small(pool: tuple[Candidate, ...], undisturbed: dict[int, Evaluation]) -> None:
    assert all(len(ray.cloudpickle.dumps(candidate)) <= 2 * 2**10 for candidate in pool)
    assert all(len(ray.cloudpickle.dumps(evaluation)) <= 20 * 2**10 for evaluation in undisturbed.values())


def test_half_a_cpu_makes_twice_as_many_workers_of_one_thread(
    ours: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...], undisturbed: dict[int, Evaluation]
) -> None:
    expected = min(len(pool), int(2 * ray.cluster_resources()["CPU"]))
    most, evaluations = 0, []
    with hired(job_of(plan, workers={"cpus": 0.5})) as (evaluate, _):
        for evaluation in climbed(evaluate, parent, pool):
            evaluations.append(evaluation)
            most = max(most, len(desks()))
        wait_until(lambda: len(desks()) == expected)
    assert most <= expected
    assert all(evaluation.worker.endswith("cpu 1 threads fp32") for evaluation in evaluations)
    assert by_index(iter(evaluations)) == undisturbed


def test_the_watch_sees_every_probe_rise(
    ours: None, attentive: None, plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    ear = Ear()
    with hired(job_of(plan, workers={"count": 1}, probe=LONG), ear) as (evaluate, _):
        list(climbed(evaluate, parent, pool[:2]))
    for name in ("control", "candidate 1"):
        told = [shares[name] for shares in ear.shares if name in shares]
        assert told == sorted(told)
        assert len(set(told)) > 2
        assert 0.0 <= told[0] < told[-1] <= 1.0


def test_the_private_ray_listens_on_loopback_only(ours: None) -> None:
    heard = set()
    for process in [psutil.Process(), *family()]:
        with suppress(psutil.NoSuchProcess):
            ends = process.net_connections(kind="tcp")
            heard |= {f"{process.name()} {end.laddr.ip}" for end in ends if end.status == psutil.CONN_LISTEN}
    assert len(heard) > 2
    open_to_others = {ear for ear in heard if ear.split()[-1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")}
    assert open_to_others == set()


def test_the_private_ray_turns_away_whoever_lacks_its_token(ours: None, tmp_path: Path) -> None:
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


def test_memory_that_no_node_has_is_said_with_what_there_is() -> None:
    need = {"CPU": 1.0, "GPU": 0.0, "memory": 64 * 2.0**30}
    nodes = [{"CPU": 8.0, "memory": 2.0**34}, {"CPU": 4.0, "GPU": 1.0, "memory": 2.0**35}]
    with pytest.raises(
        UserError, match=r"one asks for 1 CPUs, 0 GPUs, 64\.0 GiB .* the nodes have 8 CPUs, 0 GPUs, 16\.0"
    ):
        cluster.require_room(need, nodes)
    assert cluster.slots(need | {"memory": 2.0**33}, nodes) == 2 + 4


def test_of_many_busy_workers_a_few_are_asked_at_a_time_and_all_in_turn():
    asked_workers = Counter()

    class Actor:
        def __init__(self, index):
            self.progress = self
            self.index = index

        def options(self, concurrency_group):
            return self

        def remote(self):
            asked_workers[self.index] += 1
            return object()

    pool = remote.Pool.__new__(remote.Pool)
    calls = [remote.Call(index, "", 0.0, lambda actor: None) for index in range(20)]
    pool.busy = {f"work {call.key}": (call, [Actor(call.key)], 0.0) for call in calls}
    asked = {}
    for _ in range(5):
        pool.ask(asked)
        asked.clear()  # all have answered
    assert dict(asked_workers) == dict.fromkeys(range(20), 2)
    asked = {"owed": 3}
    for _ in range(5):
        pool.ask(asked)
    assert sorted(asked.values()) == list(range(20)), "a worker that owes an answer was asked again"
    assert {call.key for call, _, _ in pool.busy.values()} == set(range(20))
