"""Nodes that join and are lost: what a search makes of it, on one cluster of raylets on this machine."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray
from support.builders import refused, run_halving, tiny_context, tiny_snapshot
from support.callbacks import RecordingCallback, by_place, pid_of

from raymask.core.callbacks import Callback
from raymask.core.errors import UserError
from raymask.core.recipe import propose_candidates, resolve
from raymask.core.tasks import Snapshot
from raymask.executor import actor_pool, connection, local_executor, ray_executor, worker_actor

import psutil  # isort: skip - Ray brings it along, so it is found once Ray is imported

EARLY_EVAL = {"epochs": 10.0, "eval_steps": 10}
JOB = tiny_context(early_eval=EARLY_EVAL)


@dataclass
class Nodes:
    """A head without CPUs, which this process is connected to, and nodes that come and go."""

    cluster: Any
    folder: Path
    numbers: Iterator[int] = field(default_factory=count)

    def add(self, **resources: Any) -> Any:
        """A node; each has a folder of its own, else the second one's start would empty the first one's."""
        settings = {"include_dashboard": False, "object_store_memory": 2**27} | resources
        return self.cluster.add_node(**settings, temp_dir=str(self.folder / str(next(self.numbers))))

    def kill(self, node: Any) -> None:
        os.kill(raylet(node), signal.SIGKILL)

    def remove_all(self) -> None:
        for node in list(self.cluster.worker_nodes):
            self.cluster.remove_node(node)


def raylet(node: Any) -> int:
    [info] = node.all_processes["raylet"]
    return int(info.process.pid)


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized()
    with (
        tempfile.TemporaryDirectory(prefix="rm-", ignore_cleanup_errors=True) as folder,  # short enough for sockets
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        connection.reread_environment()
        found = Nodes(Cluster(), Path(folder))
        found.add(num_cpus=0)
        with connection.ray_connection(JOB, found.cluster.address):
            yield found
        found.cluster.shutdown()


@pytest.fixture
def nodes(head: Nodes) -> Iterator[Nodes]:
    yield head
    head.remove_all()


@pytest.fixture(scope="module")
def parent() -> Snapshot:
    return tiny_snapshot(JOB)


def test_a_search_waits_for_a_cluster_to_grow_as_long_as_it_is_told_to(
    parent: Snapshot, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an autoscaler would do is done here when the search says that it waits."""
    monkeypatch.setattr(actor_pool, "NO_WORKER_WARNING_S", 1.0)
    demand: list[Any] = []

    class Grower(RecordingCallback):
        def on_message(self, text: str) -> None:
            super().on_message(text)
            if text.startswith("waiting for the cluster") and not demand:
                demand.extend(actors_in_want())
                nodes.add(num_cpus=1)

    ear, pool = Grower(), propose_candidates(resolve(JOB.spec), 1)[:2]
    said = refused(ray_executor.RayExecutor(JOB, RecordingCallback(), None).__enter__)
    assert "no node can hold a worker" in said
    assert "the nodes have 0 CPUs" in said
    assert "workers.scale_up_timeout" in said
    with ray_executor.RayExecutor(
        tiny_context(early_eval=EARLY_EVAL, workers={"scale_up_timeout": 60}), ear, None
    ) as executor:
        assert all(evaluation.ok for evaluation in run_halving(executor, parent, pool))
    note, *_ = [text for text in ear.notes if text.startswith("waiting for the cluster")]
    assert "a worker asks for 1 CPUs, 0 GPUs" in note
    assert len(demand) == len(pool), "an autoscaler sees no demand"
    with (
        ray_executor.RayExecutor(
            tiny_context(early_eval=EARLY_EVAL, workers={"scale_up_timeout": 2, "cpus": 8}), RecordingCallback(), None
        ) as executor,
        pytest.raises(UserError, match=r"no node can hold a worker: one asks for 8 CPUs"),
    ):
        list(run_halving(executor, parent, pool))


def test_a_late_node_gets_work_and_its_loss_is_survived(parent: Snapshot, nodes: Nodes) -> None:
    nodes.add(num_cpus=1)
    job = tiny_context(early_eval=EARLY_EVAL, candidates={"count": 400}, workers={"max_retries": 5})
    pool, ear, found = propose_candidates(resolve(job.spec), 1), RecordingCallback(), {}
    first = elsewhere = late = killed = None
    with ray_executor.RayExecutor(job, ear, None) as executor:
        for evaluation in run_halving(executor, parent, pool):
            found[evaluation.candidate.index] = evaluation
            pid = pid_of(evaluation)
            if late is None:
                first, late = pid, nodes.add(num_cpus=1)
            elif pid != first and elsewhere is None:
                elsewhere = pid
            elif elsewhere is not None and killed is None:  # it is in the middle of its next candidate
                assert elsewhere in {child.pid for child in psutil.Process(raylet(late)).children(recursive=True)}
                killed = elsewhere
                nodes.kill(late)
            elif any("its worker was lost" in note for note in ear.troubles):
                break
    assert killed is not None, "the late node got no work"
    assert all(evaluation.ok for evaluation in found.values())
    assert any("its worker was lost" in note for note in ear.troubles)


def test_weights_that_are_lost_with_their_node_are_put_again(
    parent: Snapshot, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node has the only copy, its owner and the only worker; another has joined when it is killed."""

    class Holder:
        def hold(self, value: object) -> list[Any]:
            self.held = ray.put(value)
            return [self.held]

    pool = propose_candidates(resolve(JOB.spec), 1)
    with local_executor.LocalExecutor(JOB, Callback()) as executor:
        undisturbed = by_place(run_halving(executor, parent, pool))
    lost = nodes.add(num_cpus=1, resources={"holder": 1})
    puts: list[Any] = []
    put, ear, found = ray.put, RecordingCallback(), []

    def elsewhere(value: object, *args: Any, **kwargs: Any) -> Any:
        puts.append(put(value, *args, **kwargs) if puts else ray.get(holder.hold.remote(value))[0])
        return puts[-1]

    with ray_executor.RayExecutor(JOB, ear, None) as executor:
        holder = ray.remote(num_cpus=0, resources={"holder": 1})(Holder).remote()
        monkeypatch.setattr(ray, "put", elsewhere)
        for evaluation in run_halving(executor, parent, pool):
            found.append(evaluation)
            if len(found) == 1:
                nodes.add(num_cpus=1)
                nodes.kill(lost)
    assert len(puts) == 2
    assert worker_actor.get_if_alive([puts[0]]) is None
    assert any("its worker was lost" in note for note in ear.troubles)
    assert by_place(found) == undisturbed


def actors_in_want() -> list[Any]:
    """Resource demands that an autoscaler would read."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return [
        demand
        for demand in status.resource_demands.ray_task_actor_demand
        for _ in range(sum(bundle.count for bundle in demand.bundles_by_count))
    ]
