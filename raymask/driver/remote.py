"""How are the two seams served by Ray?

The driver puts weights into the object store once a level and sends candidates, which are seeds; actors redraw the
masks and send back scores and digests. One actor per worker slot, kept across levels. The machine's fault is retried
on a fresh actor; the candidate's own fault is a record and never retried.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.services import get_ray_address_from_environment
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from raymask.core.errors import UserError
from raymask.core.records import (
    Candidate,
    Checkpoint,
    Evaluate,
    Evaluation,
    FineTune,
    Settling,
    Snapshot,
    Watch,
)
from raymask.core.tensors import Packed
from raymask.train.worker import Job, MachineFault, Worker

INFRA = (RayActorError, ObjectLostError, OutOfMemoryError, MachineFault)
POLL = 0.5  # seconds between looks at progress, deadlines and new nodes
STARTS = 5  # workers that may fail to start, one after another, before the search gives up
PORT = 6379
PATIENCE = 30.0  # seconds without any worker after which the wait is worth a line
REMOTE_CODE = "transformers_modules."
ROOT, FOLDER = "/tmp", "raymask-"  # noqa: S108 - sockets live in it, whose paths must be short; mkdtemp makes it ours
ANSWER = 10.0  # seconds in which a cluster must accept a connection


class Desk:
    """What an actor runs: a Worker behind object references, and a second thread that says how far it is."""

    def __init__(self, job: Job, on_gpu: bool) -> None:
        self.share = 0.0
        self.worker = Worker(job, "cuda" if on_gpu else "cpu", self.tell)

    def tell(self, share: float) -> None:
        self.share = share

    def progress(self) -> float:
        return self.share

    def probe(self, key: str, refs: Mapping[str, Any], candidate: Candidate) -> Evaluation:
        try:
            return self.worker.probe(snapshot(key, refs), candidate)
        finally:
            self.share = 0.0  # here, not at the next start: who asks in between must not hear of the last work

    def settle(self, key: str, refs: Mapping[str, Any], settling: Settling) -> Checkpoint:
        try:
            return self.worker.settle(snapshot(key, refs), settling)
        finally:
            self.share = 0.0


def snapshot(key: str, refs: Mapping[str, Any]) -> Snapshot:
    """A snapshot over this node's one shared, read-only copy."""
    return Snapshot(key, **dict(zip(refs, ray.get(list(refs.values())), strict=True)))


@dataclass(frozen=True)
class Call:
    """One piece of work: `send` starts it on an actor; it is given up after `deadline` seconds."""

    name: str
    deadline: float
    send: Callable[[Any], Any]


@dataclass(frozen=True)
class Failed:
    """A call that will not be tried again: its deadline passed, or its machines failed too often."""

    why: str


class Pool:
    """Actors on whatever the cluster has, and the loop that keeps them busy."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self.watch = watch
        self.workers = job.spec.workers
        self.need = needs(job, alive())
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self.returning: dict[Any, Any] = {}
        self.busy: dict[Any, tuple[int, Any, float]] = {}
        self.shelf: dict[int, tuple[Packed, Any]] = {}
        self.grown = 0.0
        self.broken = 0
        require_room(self.need, alive())
        if type(job.config).__module__.startswith(REMOTE_CODE):  # the node that unpickles it may not have the module
            ray.cloudpickle.register_pickle_by_value(sys.modules[type(job.config).__module__])
        self.job = ray.put(job)
        self.actor = ray.remote(
            num_cpus=self.need["CPU"],
            num_gpus=self.need["GPU"],
            memory=self.need["memory"],
            max_restarts=0,
            concurrency_groups={"aside": 1},
        )(Desk)

    def close(self) -> None:
        for actor in self.actors():
            ray.kill(actor)

    def actors(self) -> list[Any]:
        """All of them, whatever they do."""
        waiting = [*self.idle, *self.starting.values(), *self.returning.values()]
        return [*waiting, *(actor for _, actor, _ in self.busy.values())]

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Every call's result, or a Failed, with the call's index, in the order in which they finish.

        An error that is neither the machine's nor a deadline is raised.
        """
        todo, faults = deque(range(len(calls))), Counter[int]()
        shares: dict[int, float] = {}
        asked: dict[Any, int] = {}
        late: set[int] = set()
        open_calls, looked, served = len(calls), 0.0, time.monotonic()
        self.returning = {actor.__ray_ready__.remote(): actor for actor in self.idle}  # some may have died since
        self.idle = []
        try:
            while open_calls:
                self.grow(open_calls)
                while self.idle and todo:
                    actor, index = self.idle.pop(), todo.popleft()
                    self.busy[calls[index].send(actor)] = (index, actor, time.monotonic())
                    shares[index] = 0.0
                if time.monotonic() - looked > POLL:
                    looked = time.monotonic()
                    self.watch.running({calls[index].name: share for index, share in sorted(shares.items())})
                    self.ask(asked)
                    if self.busy:
                        served = looked
                    elif looked - served > PATIENCE:
                        self.watch.note(
                            "waiting for the cluster: no worker has started yet, others may hold its resources"
                        )
                        served = looked
                    late = self.kill_late(calls)
                for ref in self.finished(asked):
                    if ref in asked:
                        self.hear(ref, asked.pop(ref), shares)
                    elif ref in self.returning:
                        self.welcome_back(ref)
                    elif ref in self.starting:
                        self.welcome(ref)
                    else:
                        index, actor, _ = self.busy.pop(ref)
                        shares.pop(index, None)
                        outcome = self.collect(ref, actor, calls[index], faults, index, late)
                        if outcome is None:
                            todo.appendleft(index)
                        else:
                            open_calls -= 1
                            yield index, outcome
        finally:  # whoever stops listening, or an error, leaves work behind that nobody waits for
            for _, actor, _ in self.busy.values():
                ray.kill(actor)
            self.busy.clear()

    def finished(self, asked: Mapping[Any, int]) -> list[Any]:
        """References that have become ready, waited for no longer than POLL seconds."""
        refs = [*self.busy, *self.returning, *self.starting, *asked]
        if not refs:
            time.sleep(POLL)
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=POLL)
        return list(ready)

    def ask(self, asked: dict[Any, int]) -> None:
        """Ask every busy worker how far it is, unless it still owes an answer."""
        owing = set(asked.values())
        for index, actor, _ in self.busy.values():
            if index not in owing:
                asked[actor.progress.options(concurrency_group="aside").remote()] = index

    def grow(self, open_calls: int) -> None:
        """Start actors for the work that is open where the cluster has room: also on nodes that came late."""
        if time.monotonic() - self.grown < POLL:
            return
        self.grown = time.monotonic()
        room = slots(self.need, alive())
        wanted = min(room, open_calls, self.workers.count or room)
        for _ in range(wanted - len(self.actors())):
            actor = self.actor.remote(self.job, self.need["GPU"] > 0)
            self.starting[actor.__ray_ready__.remote()] = actor

    def welcome_back(self, ref: Any) -> None:
        """An actor of an earlier round has answered, or died in between, which is nobody's fault."""
        actor = self.returning.pop(ref)
        try:
            ray.get(ref)
        except RayError:
            ray.kill(actor)
        else:
            self.idle.append(actor)

    def welcome(self, ref: Any) -> None:
        """An actor has started, or failed to: the latter a few times only."""
        actor = self.starting.pop(ref)
        try:
            ray.get(ref)
        except Exception as error:  # noqa: BLE001 - whatever a start can die of, the count below decides
            ray.kill(actor)
            self.broken += getattr(error, "actor_init_failed", True)  # else its node went away
            self.watch.note(f"a worker did not start: {brief(error)}")
            if self.broken >= STARTS:
                raise UserError(
                    f"{STARTS} workers in a row did not start; the last one said: {brief(error)}. Is raymask installed "
                    "on every node, in the driver's version?"
                ) from None
        else:
            self.broken = 0
            self.idle.append(actor)

    def hear(self, ref: Any, index: int, shares: dict[int, float]) -> None:
        """A worker says how far it is; one that has died is found out elsewhere."""
        try:
            share = ray.get(ref)
        except RayError:
            return
        if index in shares:
            shares[index] = max(shares[index], share)  # it falls back to zero when the work is done

    def kill_late(self, calls: Sequence[Call]) -> set[int]:
        """End what is past its deadline."""
        late = set()
        for index, actor, since in self.busy.values():
            if time.monotonic() - since > calls[index].deadline:
                late.add(index)
                ray.kill(actor)
        return late

    def collect(self, ref: Any, actor: Any, call: Call, faults: Counter[int], index: int, late: set[int]) -> Any | None:
        """A finished call's result; None when it is to be tried again."""
        try:
            result = ray.get(ref)
        except INFRA as error:
            ray.kill(actor)
            if isinstance(error, ObjectLostError):
                self.shelf.clear()
            if index in late:
                return Failed(f"took longer than the deadline of {call.deadline:g} s (workers.deadline)")
            faults[index] += 1
            if faults[index] <= self.workers.retries:
                self.watch.note(f"{call.name}: its worker was lost: {brief(error)}; trying again elsewhere")
                return None
            return Failed(f"its workers failed {faults[index]} times; the last one: {brief(error)}")
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        self.broken = 0
        if index not in late:  # it finished while it was being ended
            self.idle.append(actor)
        return result

    def put(self, parent: Snapshot) -> dict[str, Any]:
        """References to a snapshot's tensors; what the object store has already is not put again."""
        tensors = {"weights": parent.weights, "optimizer": parent.optimizer, "teacher": parent.teacher}
        refs = {}
        for name, packed in tensors.items():
            if packed is not None:
                if id(packed) not in self.shelf:
                    self.shelf[id(packed)] = (packed, ray.put(packed))
                refs[name] = self.shelf[id(packed)][1]
        return refs

    def keep(self, parents: Sequence[Snapshot]) -> None:
        """Let go of every tensor but those of `parents`."""
        wanted = {id(packed) for parent in parents for packed in (parent.weights, parent.optimizer, parent.teacher)}
        self.shelf = {key: entry for key, entry in self.shelf.items() if key in wanted}


@contextmanager
def workers(job: Job, watch: Watch, address: str | None) -> Iterator[tuple[Evaluate, FineTune]]:
    """The two seams on Ray: on a cluster when there is an address, else on a private Ray that ends with the block."""
    watch.note(f"joining the Ray cluster at {address}" if address else "starting Ray on this machine")
    with connected(job, address):
        pool = Pool(job, watch)
        watch.note(f"room for {slots(pool.need, alive())} workers; each has {offer(pool.need)}")

        def evaluate(parent: Snapshot, candidates: Sequence[Candidate]) -> Iterator[Evaluation]:
            pool.keep([parent])

            def call(candidate: Candidate) -> Call:
                return Call(
                    candidate.name,
                    pool.workers.deadline,
                    lambda actor: actor.probe.remote(parent.key, pool.put(parent), candidate),
                )

            for index, outcome in pool.run([call(candidate) for candidate in candidates]):
                failed = isinstance(outcome, Failed)
                yield Evaluation(candidate=candidates[index], error=outcome.why, machine=True) if failed else outcome

        def fine_tune(work: Sequence[tuple[Snapshot, Settling]]) -> Iterator[tuple[int, Checkpoint]]:
            pool.keep([parent for parent, _ in work])

            def call(parent: Snapshot, settling: Settling) -> Call:
                return Call(
                    settling.name,
                    pool.workers.deadline * max(1.0, settling.stage.epochs),
                    lambda actor: actor.settle.remote(parent.key, pool.put(parent), settling),
                )

            for index, outcome in pool.run([call(parent, settling) for parent, settling in work]):
                if isinstance(outcome, Failed):
                    raise UserError(f"{work[index][1].name}: {outcome.why}. The same command goes on from here")
                yield index, outcome

        try:
            yield evaluate, fine_tune
        finally:
            pool.close()


Resources = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU, memory in bytes."""


def needs(job: Job, nodes: Sequence[Resources]) -> Resources:
    """What one worker takes; a GPU each where the nodes have any and the spec does not say."""
    gpus = job.spec.workers.gpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    return {"CPU": job.spec.workers.cpus, "GPU": gpus, "memory": job.memory(on_gpu=gpus > 0)}


def slots(need: Resources, nodes: Sequence[Resources]) -> int:
    """How many workers all nodes together can hold."""
    return sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in need.items() if amount)
        for node in nodes
    )


def alive() -> list[Resources]:
    """Resources of every node of the cluster that answers."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def require_room(need: Resources, nodes: Sequence[Resources]) -> None:
    """Raise UserError when no node can hold even one worker."""
    if not slots(need, nodes):
        raise UserError(
            f"no node can hold a worker: one asks for {offer(need)} (workers.cpus, workers.gpus, the model's memory), "
            f"the nodes have {'; '.join(map(offer, nodes)) or 'nothing'}"
        )


def offer(resources: Resources) -> str:
    """Resources in words."""
    memory = resources.get("memory", 0.0) / 2**30
    return f"{resources.get('CPU', 0.0):g} CPUs, {resources.get('GPU', 0.0):g} GPUs, {memory:.1f} GiB"


def brief(error: BaseException) -> str:
    """An error of Ray's without its page of advice."""
    text = str(getattr(error, "cause", None) or error).strip() or type(error).__name__
    lines = text.splitlines()
    if isinstance(error, RayActorError) and not getattr(error, "actor_init_failed", False):
        return "its process or node died"
    # A worker's own error stands below the traceback, unindented, as `ValueError: ...`.
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*: ", line)]
    found = raised[-1] if raised and getattr(error, "actor_init_failed", False) else lines[0]
    return found[:200]


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
        ray.init(where, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({brief(error)}). Start one with `ray start --head`, "
            "or leave out --address for a private one"
        ) from None


def auth_mode() -> str:
    """How to meet a cluster: as the environment says, else with a token where there is one."""
    token = "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").exists()
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
