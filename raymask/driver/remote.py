"""How are the two seams served by Ray?

The driver puts weights into the object store once a level and sends candidates, which are seeds; actors redraw the
masks and send back scores and digests. One actor per worker slot, kept across levels. The machine's fault is retried
on a fresh actor; the candidate's own fault is a record and never retried.
"""

from __future__ import annotations

import os
import re
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymask.core.errors import UserError, first_line
from raymask.core.records import (
    Checkpoint,
    Climb,
    Evaluate,
    Evaluation,
    FineTune,
    Place,
    Settling,
    Snapshot,
    Watch,
)
from raymask.driver import dispatch
from raymask.driver.cluster import Resources, alive, connected, needs, offer, require_room, slots
from raymask.driver.dispatch import SharedTaskWait, Starvation
from raymask.driver.failure_policy import Decision, Failure, FailurePolicy
from raymask.train import gang
from raymask.train.gang import ALONE, Gang, Meeting
from raymask.train.worker import Job, MachineFault, Worker

INFRA = (RayActorError, ObjectLostError, OutOfMemoryError, MachineFault)
POLL = 0.5  # seconds between looks at progress, deadlines and new nodes
QUESTIONS = 8  # workers asked at one look how far they are: to ask costs about as much as to send a candidate
STARTS = 5  # workers that may fail to start, one after another, before the search gives up
PATIENCE = 15.0  # seconds without any worker after which the wait is worth a line
ANSWER = 60.0  # seconds in which a worker of an earlier stage must say that it is still there
GATHER = 20.0  # seconds for which work that several can share waits for those that have not started
LOST = 300.0  # seconds in which nodes that a search once had may come back
REMOTE_CODE = "transformers_modules."


class Desk:
    """What an actor runs: a Worker behind object references, and a second thread that says how far it is.

    Where a model is cut, the first process of the gang starts the others, its followers, and tells them all it is told.
    """

    def __init__(self, job: Job, need: Resources, member: Gang = ALONE, meeting: Meeting | None = None) -> None:
        self.share = 0.0
        self.followers: list[Any] = []
        self.leads = meeting is None
        device = torch.device("cuda" if need["GPU"] > 0 else "cpu")
        if job.spec.workers.gang > 1 and meeting is None:
            member = Gang(0, job.spec.workers.gang, cut=True)
            meeting = self.meet()
            where: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            if ray.util.get_current_placement_group():  # a trial of Ray Tune has a place for all of them
                where = "DEFAULT"
            self.followers = [
                hire(need).options(scheduling_strategy=where).remote(job, need, replace(member, rank=rank), meeting)
                for rank in range(1, member.size)
            ]
        if meeting is not None:
            self.gathered = gang.gathered(member, meeting, device, self.store if self.leads else None)
            self.gathered.__enter__()  # for as long as the process lives
        self.worker = Worker(job, device.type, self.tell, member)

    def tell(self, share: float) -> None:
        self.share = share

    def progress(self) -> float:
        return self.share

    def probe(
        self, key: str, refs: Mapping[str, Any], climb: Climb, paused: Sequence[Any]
    ) -> tuple[Evaluation, Snapshot | None]:
        """`paused`: a reference to where the candidate paused, if there is one; it may be lost."""
        try:
            below = still_there(paused)
            with self.followed("probe", key, refs, climb, paused if below else []):
                return self.worker.probe(snapshot(key, refs), climb, below)
        finally:
            self.share = 0.0  # here, not at the next start: who asks in between must not hear of the last work

    def meet(self) -> Meeting:
        """Open the place where a gang meets whose first member this worker is."""
        self.store, meeting = gang.opened(ray.util.get_node_ip_address())
        return meeting

    def settle(
        self,
        key: str,
        refs: Mapping[str, Any],
        settling: Settling,
        member: Gang = ALONE,
        meeting: Meeting | None = None,
    ) -> Checkpoint | None:
        """Alone, or as a member of a gang that meets somewhere."""
        gathered = None
        if meeting is not None:
            gathered = gang.gathered(member, meeting, self.worker.device, None if member.rank else self.store)
        try:
            with self.followed("settle", key, refs, settling):
                return self.worker.settle(snapshot(key, refs), settling, gathered)
        finally:
            self.share = 0.0

    @contextmanager
    def followed(self, method: str, *arguments: Any) -> Iterator[None]:
        """The followers do the same as this process does in the block; whoever cannot ends, so that no one waits."""
        refs = [getattr(follower, method).remote(*arguments) for follower in self.followers]
        try:
            yield
        except MachineFault:
            if not self.leads:
                os._exit(1)
            raise
        ray.get(refs)


def hire(need: Resources) -> Any:
    """What starts an actor."""
    return ray.remote(
        num_cpus=need["CPU"],
        num_gpus=need["GPU"],
        memory=need["memory"],
        max_restarts=0,
        concurrency_groups={"aside": 1},
    )(Desk)


def snapshot(key: str, refs: Mapping[str, Any]) -> Snapshot:
    """A snapshot over this node's one shared, read-only copy."""
    return Snapshot(key, **dict(zip(refs, ray.get(list(refs.values())), strict=True)))


def still_there(paused: Sequence[Any]) -> Snapshot | None:
    """What a reference stands for; None when there is none, or when it went with its node."""
    try:
        return next(iter(ray.get(list(paused))), None)
    except RayError:
        return None


@dataclass(frozen=True)
class Call:
    """One piece of work that at most so many `hands` can share, given up after `deadline` seconds.

    `send` starts it on actors, 1, 2, 4, ... of them, and returns their references, of which the first has the result.
    """

    key: Any
    name: str
    deadline: float
    send: Callable[[Sequence[Any]], Sequence[Any]]
    hands: int = 1


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
        self.busy: dict[Any, tuple[Call, Sequence[Any], float]] = {}
        self.helping: dict[Any, Any] = {}
        self.policy = FailurePolicy(self.workers.retries, STARTS)
        self.shared_wait = SharedTaskWait(GATHER)
        self.shelf: dict[int, Any] = {}
        self.grown = 0.0
        self.broken = 0
        if not self.workers.wait:
            require_room(self.need, alive(), self.workers.gang)
        if type(job.config).__module__.startswith(REMOTE_CODE):  # the node that unpickles it may not have the module
            ray.cloudpickle.register_pickle_by_value(sys.modules[type(job.config).__module__])
        self.job = ray.put(job)
        self.actor = hire(self.need)

    def close(self) -> None:
        dismiss(self.actors())

    def actors(self) -> list[Any]:
        """All of them, whatever they do."""
        waiting = [*self.idle, *self.starting.values(), *self.returning.values()]
        return [*waiting, *(actor for _, actors, _ in self.busy.values() for actor in actors)]

    def run(self, wanted: Callable[[], Iterable[Call]]) -> Iterator[tuple[Any, Any]]:
        """Every wanted call's result, or a Failed, with the call's key, in the order in which they finish.

        `wanted`: the calls worth doing now, those that run included, the most worthwhile first; it is asked again and
        again until there are none. An error that is neither the machine's nor a deadline is raised.
        """
        faults = Counter[Any]()
        shares: dict[Any, float] = {}
        asked: dict[Any, Any] = {}
        late: set[Any] = set()
        looked = 0.0
        began = time.monotonic()
        starvation = Starvation(PATIENCE, began, began)
        self.returning = {actor.__ray_ready__.remote(): actor for actor in self.idle}  # some may have died since
        self.idle = []
        try:
            while any(True for _ in wanted()):
                self.grow(wanted)
                self.hand_out(wanted, shares)
                if time.monotonic() - looked > POLL:
                    looked = time.monotonic()
                    names = {call.key: call.name for call, _, _ in self.busy.values()}
                    self.watch.running({name: shares[key] for key, name in sorted(names.items())})
                    self.ask(asked)
                    starved = starvation.observe(bool(self.busy), looked)
                    if starved is not None:
                        self.wait_for_room(starved)
                    late = self.kill_late(looked)
                    if looked - began > ANSWER:
                        dismiss(self.returning.values())
                for ref in self.finished(asked):
                    if ref in asked:
                        self.hear(ref, asked.pop(ref), shares)
                    elif ref in self.returning:
                        self.welcome_back(ref)
                    elif ref in self.starting:
                        self.welcome(ref)
                    elif ref in self.helping:
                        self.helped(ref)
                    else:
                        call, actors, _ = self.busy[ref]
                        outcome = self.collect(ref, actors, call, faults, late)
                        del self.busy[ref]  # not before: an error that is raised above must find its actors
                        shares.pop(call.key, None)
                        if outcome is not None:
                            yield call.key, outcome
        except OSError as error:
            if error.errno is not None or isinstance(error, RayTaskError):  # not Ray's own
                raise
            raise UserError(
                f"this machine's Ray node is gone ({first_line(error)}). Once a node runs here again, the same command "
                "goes on from here"
            ) from None
        finally:  # whoever stops listening, or an error, leaves work behind that nobody waits for
            for _, actors, _ in self.busy.values():
                dismiss(actors)
            self.busy.clear()
            self.helping.clear()
            if self.workers.wait:  # what has not started by now would only make the cluster grow
                dismiss(self.starting.values())
                self.starting.clear()

    def wait_for_room(self, seconds: float) -> None:
        """Say what is waited for; raise UserError when it is too long since any node could hold a worker."""
        nodes = alive()
        if seconds > (self.workers.wait or LOST):
            require_room(self.need, nodes, self.workers.gang)
        free = offer(ray.available_resources())
        self.watch.note(
            f"waiting for the cluster for {seconds:.0f} s: a worker asks for {offer(self.need)}; of {len(nodes)} nodes "
            f"is free: {free}"
        )

    def finished(self, asked: Iterable[Any]) -> list[Any]:
        """References that have become ready, waited for no longer than POLL seconds."""
        refs = [*self.busy, *self.helping, *self.returning, *self.starting, *asked]
        if not refs:
            time.sleep(POLL)
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=POLL)
        return list(ready)

    def hand_out(self, wanted: Callable[[], Iterable[Call]], shares: dict[Any, float]) -> None:
        """Send what nobody works on to whoever is idle, evenly where there are more idle than there is to do."""
        if not self.idle:
            return
        running = {call.key for call, _, _ in self.busy.values()}
        free = list(islice((call for call in wanted() if call.key not in running), len(self.idle)))
        hands = [call.hands for call in free]
        if self.shared_wait.should_wait(hands, bool(self.starting or self.returning), time.monotonic()):
            return
        for call, count in zip(free, dispatch.share_workers(hands, len(self.idle)), strict=True):
            actors = [self.idle.pop() for _ in range(count)]
            leader, *helpers = call.send(actors)
            self.busy[leader] = (call, actors, time.monotonic())
            self.helping |= dict.fromkeys(helpers, leader)
            shares[call.key] = 0.0

    def ask(self, asked: dict[Any, Any]) -> None:
        """Ask the busy workers that come next how far they are, except those that still owe an answer."""
        refs = {call.key: ref for ref, (call, _, _) in self.busy.items()}
        now, then = dispatch.next_to_poll(list(refs), asked.values(), QUESTIONS)
        for key in now:
            _, (leader, *_), _ = self.busy[refs[key]]
            asked[leader.progress.options(concurrency_group="aside").remote()] = key
        self.busy = {refs[key]: self.busy[refs[key]] for key in then}

    def grow(self, wanted: Callable[[], Iterable[Call]]) -> None:
        """Start actors for the work that is open where the cluster has room: also on nodes that came late."""
        if time.monotonic() - self.grown < POLL:
            return
        self.grown = time.monotonic()
        # On a cluster that grows, waiting actors are what makes it.
        room = self.workers.count or sys.maxsize
        if not self.workers.wait:
            room = min(slots(self.need, alive(), self.workers.gang), room)
        demand = (call.hands for call in wanted())
        for _ in range(dispatch.num_workers_to_start(demand, room, len(self.actors()))):
            actor = self.actor.remote(self.job, self.need)
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
            if self.policy.decide_start(self.broken) is Decision.RAISE:
                raise UserError(
                    f"{STARTS} workers in a row did not start; the last one said: {brief(error)}. Is raymask installed "
                    "on every node, in the driver's version?"
                ) from None
        else:
            self.broken = 0
            self.idle.append(actor)

    def hear(self, ref: Any, key: Any, shares: dict[Any, float]) -> None:
        """A worker says how far it is; one that has died is found out elsewhere."""
        try:
            share = ray.get(ref)
        except RayError:
            return
        if key in shares:
            shares[key] = max(shares[key], share)  # it falls back to zero when the work is done

    def kill_late(self, now: float) -> set[Any]:
        """End what is past its deadline; returns the keys."""
        late = dispatch.overdue({call.key: since + call.deadline for call, _, since in self.busy.values()}, now)
        for call, actors, _ in self.busy.values():
            if call.key in late:
                dismiss(actors)
        return late

    def helped(self, ref: Any) -> None:
        """A helper has done its part of a call, or failed, which ends the call for all."""
        leader = self.helping.pop(ref)
        try:
            answer(ref)
        except INFRA:
            if leader in self.busy:
                _, actors, _ = self.busy[leader]
                dismiss(actors)

    def collect(
        self, ref: Any, actors: Sequence[Any], call: Call, faults: Counter[Any], late: Container[Any]
    ) -> Any | None:
        """A finished call's result; None when it is to be tried again."""
        try:
            result = answer(ref)
        except Exception as error:
            timed_out = call.key in late
            faults[call.key] += not timed_out
            failure = Failure(isinstance(error, INFRA), faults[call.key], timed_out)
            decision = self.policy.decide(failure)
            if decision is Decision.RAISE:
                raise
            dismiss(actors)
            if isinstance(error, ObjectLostError):
                self.shelf.clear()
            if timed_out:
                return Failed(f"took longer than the deadline of {call.deadline:g} s (workers.deadline)")
            if decision is Decision.RETRY:
                self.watch.note(f"{call.name}: its worker was lost: {brief(error)}; trying again elsewhere")
                return None
            return Failed(f"its workers failed {failure.attempt} times; the last one: {brief(error)}")
        self.broken = 0
        if call.key not in late:  # it finished while it was being ended
            self.idle.extend(actors)
        return result

    def put(self, parent: Snapshot) -> dict[str, Any]:
        """References to a snapshot's tensors; what the object store has already is not put again.

        It has them for as long as this process does.
        """
        tensors = {"weights": parent.weights, "optimizer": parent.optimizer, "teacher": parent.teacher}
        refs = {}
        for name, packed in tensors.items():
            if packed is not None:
                if id(packed) not in self.shelf:
                    self.shelf[id(packed)] = ray.put(packed)
                    weakref.finalize(packed, self.shelf.pop, id(packed), None)
                    self.watch.sent(packed.buffer.nbytes)
                refs[name] = self.shelf[id(packed)]
        return refs


@contextmanager
def workers(job: Job, watch: Watch, address: str | None) -> Iterator[tuple[Evaluate, FineTune]]:
    """The two seams on Ray: on a cluster when there is an address, else on a private Ray that ends with the block."""
    watch.note(f"joining the Ray cluster at {address}" if address else "starting Ray on this machine")
    with connected(job, address):
        pool = Pool(job, watch)
        watch.note(f"room for {slots(pool.need, alive(), pool.workers.gang)} workers; each has {offer(pool.need)}")

        def evaluate(parents: Mapping[int, Snapshot], wanted: Callable[[], Iterable[Climb]]) -> Iterator[Evaluation]:
            paused: dict[Place, Any] = {}
            climbs: dict[Place, Climb] = {}
            top = len(job.spec.probe.rungs) - 1

            def call(climb: Climb) -> Call:
                candidate, parent = climb.candidate, parents[climb.candidate.parent]

                def send(actors: Sequence[Any]) -> Sequence[Any]:
                    climbs[climb.place] = climb
                    below = [paused[climb.below]] if climb.below in paused else []
                    probe = actors[0].probe.options(num_returns=2).remote
                    ref, pause = probe(parent.key, pool.put(parent), climb, below)
                    if climb.rung < top:
                        paused[climb.place] = pause
                    return [ref]

                return Call(climb.place, candidate.name, pool.workers.deadline, send)

            for place, outcome in pool.run(lambda: map(call, wanted())):
                climb = climbs[place]
                if isinstance(outcome, Failed):
                    outcome = Evaluation(
                        candidate=climb.candidate, rung=climb.rung, order=climb.order, error=outcome.why, machine=True
                    )
                yield outcome
                if paused:
                    useful = {above.below for above in wanted()}
                    useful |= {running.key for running, _, _ in pool.busy.values()}
                    for place in paused.keys() - useful:
                        del paused[place]

        def fine_tune(work: Sequence[tuple[Snapshot, Settling]]) -> Iterator[tuple[int, Checkpoint]]:
            def call(index: int) -> Call:
                parent, settling = work[index]

                def send(actors: Sequence[Any]) -> Sequence[Any]:
                    refs, size = pool.put(parent), len(actors)
                    meeting = actors[0].meet.remote() if size > 1 else None
                    return [
                        actor.settle.remote(parent.key, refs, settling, Gang(rank, size), meeting)
                        for rank, actor in enumerate(actors)
                    ]

                return Call(
                    index,
                    settling.name,
                    pool.workers.deadline * max(1.0, settling.stage.epochs),
                    send,
                    1 if 0 < pool.need["GPU"] < 1 else settling.stage.shards,  # NCCL wants a GPU a process
                )

            missing = dict.fromkeys(range(len(work)))
            for index, outcome in pool.run(lambda: map(call, missing)):
                if isinstance(outcome, Failed):
                    raise UserError(f"{work[index][1].name}: {outcome.why}. The same command goes on from here")
                del missing[index]
                yield index, outcome

        try:
            yield evaluate, fine_tune
        finally:
            pool.close()


def dismiss(actors: Iterable[Any]) -> None:
    """End them, whatever they do."""
    for actor in actors:
        ray.kill(actor)


def answer(ref: Any) -> Any:
    """What a worker returned. Raises its UserError as what it is."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


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
