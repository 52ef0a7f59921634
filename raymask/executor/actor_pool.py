"""Pool of Ray actors with retries, timeouts and scaling.

The pool starts one actor for each worker slot and keeps the actors across levels. It sends tasks to idle actors,
polls their progress, starts more actors when nodes join, and retries a task on a fresh actor after a system failure.
"""

from __future__ import annotations

import re
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from raymask.core.errors import UserError, first_line
from raymask.core.protocols import Callback
from raymask.core.tasks import Snapshot
from raymask.executor import dispatch
from raymask.executor.dispatch import SharedTaskWait, Starvation
from raymask.executor.failure_policy import Decision, Failure, FailurePolicy
from raymask.executor.resources import (
    format_resources,
    node_resources,
    num_worker_slots,
    require_capacity,
    resources_per_worker,
)
from raymask.executor.worker_actor import actor_class
from raymask.train.context import WorkerContext
from raymask.train.failures import SystemFailure

SYSTEM_ERRORS = (RayActorError, ObjectLostError, OutOfMemoryError, SystemFailure)
"""Errors that are system failures. All others come from the task's own code."""

POLL_INTERVAL_S = 0.5  # seconds between two checks of progress, timeouts and new nodes

MAX_PROGRESS_POLLS = 8  # workers asked for their progress in one poll: a request costs about as much as a dispatch

MAX_FAILED_STARTS = 5  # workers in a row that may fail to start before the search gives up

NO_WORKER_WARNING_S = 15.0  # seconds without any busy worker between two messages about the wait

ACTOR_PING_TIMEOUT_S = 60.0  # seconds in which an actor of an earlier run must answer that it is alive

SHARED_TASK_WAIT_S = 20.0  # seconds for which shared tasks wait for workers that have not started yet

NODE_LOSS_GRACE_S = 300.0  # seconds in which lost nodes may come back

REMOTE_CODE = "transformers_modules."  # package of a model's own code from the Hub


@dataclass(frozen=True)
class RemoteTask:
    """A task for one or more actors.

    Attributes:
        key: Identifies the task in the pool; hashable.
        name: Shown to the user while the task runs.
        timeout: Seconds after which an attempt is ended.
        send: Starts the task on the given actors (1, 2, 4, ... of them) and returns one object reference for each.
            The first reference has the result.
        max_workers: The most actors that can share the task, 1 or more.
    """

    key: Any
    name: str
    timeout: float
    send: Callable[[Sequence[Any]], Sequence[Any]]
    max_workers: int = 1


@dataclass(frozen=True)
class TaskFailed:
    """The result of a task that is not tried again.

    Attributes:
        reason: Why: it timed out, or system failures used up its retries.
    """

    reason: str


class WorkerPool:
    """Ray actors on all free worker slots of the cluster, and the loop that keeps them busy.

    Attributes:
        callback: Receives progress, messages and the sizes of objects put into the object store.
        workers: The spec's `workers` section.
        need: Resources of one worker process.
        idle: Actors without a task.
        pending_actors: Actor by the reference that is ready once the actor has started.
        pinged_actors: Actor of an earlier run by the reference that is ready once the actor answers that it is alive.
        running: Task, its actors and its start time (monotonic seconds), by the reference of the result.
        helper_refs: Reference of the result by the reference of a helper that shares the task.
        object_refs: Object reference by `id` of the packed tensors that were put into the object store.
        context: Object reference of the worker context.
        actor: The actor class.
    """

    def __init__(self, context: WorkerContext, callback: Callback) -> None:
        """Prepare the pool; actors start in `run`.

        Args:
            context: What every worker needs; it is put into the object store.
            callback: Receives progress and messages.

        Raises:
            UserError: No node can hold a worker and the spec does not wait for the cluster to scale up.
        """
        self.callback = callback
        self.workers = context.spec.workers
        self.need = resources_per_worker(context, node_resources())
        self.idle: list[Any] = []
        self.pending_actors: dict[Any, Any] = {}
        self.pinged_actors: dict[Any, Any] = {}
        self.running: dict[Any, tuple[RemoteTask, Sequence[Any], float]] = {}
        self.helper_refs: dict[Any, Any] = {}
        self.policy = FailurePolicy(self.workers.max_retries, MAX_FAILED_STARTS)
        self.shared_wait = SharedTaskWait(SHARED_TASK_WAIT_S)
        self.object_refs: dict[int, Any] = {}
        self.last_scale_up = 0.0
        self.failed_starts = 0
        if not self.workers.scale_up_timeout:
            require_capacity(self.need, node_resources(), self.workers.fsdp)
        config_module = type(context.config).__module__
        if config_module.startswith(REMOTE_CODE):  # the node that unpickles it may not have the module
            ray.cloudpickle.register_pickle_by_value(sys.modules[config_module])
        self.context = ray.put(context)
        self.actor = actor_class(self.need)

    def close(self) -> None:
        """Kill all actors."""
        kill_actors(self.actors())

    def actors(self) -> list[Any]:
        """All actors: idle, starting, not yet known to be alive, and busy."""
        waiting = [*self.idle, *self.pending_actors.values(), *self.pinged_actors.values()]
        return [*waiting, *(actor for _, actors, _ in self.running.values() for actor in actors)]

    def run(self, open_tasks: Callable[[], Iterable[RemoteTask]]) -> Iterator[tuple[Any, Any]]:
        """Run tasks until none is open.

        Args:
            open_tasks: Returns the tasks worth doing now, the running ones included, the most urgent first. It is
                called again and again until it returns none.

        Yields:
            A task's key and its result or a `TaskFailed`, in the order in which the tasks finish.

        Raises:
            UserError: No worker can start or run, or this machine's Ray node is gone.
            Exception: A task's own error, as its worker raised it.
        """
        num_failures = Counter[Any]()
        shares: dict[Any, float] = {}
        progress_refs: dict[Any, Any] = {}
        overdue: set[Any] = set()
        last_poll = 0.0
        started = time.monotonic()
        starvation = Starvation(NO_WORKER_WARNING_S, started, started)
        self.pinged_actors = {actor.__ray_ready__.remote(): actor for actor in self.idle}  # some may have died since
        self.idle = []
        try:
            while any(True for _ in open_tasks()):
                self.scale_up(open_tasks)
                self.dispatch(open_tasks, shares)
                if time.monotonic() - last_poll > POLL_INTERVAL_S:
                    last_poll = time.monotonic()
                    names = {task.key: task.name for task, _, _ in self.running.values()}
                    self.callback.on_progress({name: shares[key] for key, name in sorted(names.items())})
                    self.poll_progress(progress_refs)
                    waited = starvation.observe(bool(self.running), last_poll)
                    if waited is not None:
                        self.report_waiting(waited)
                    overdue = self.kill_overdue(last_poll)
                    if last_poll - started > ACTOR_PING_TIMEOUT_S:
                        kill_actors(self.pinged_actors.values())
                for ref in self.wait(progress_refs):
                    if ref in progress_refs:
                        self.on_progress(ref, progress_refs.pop(ref), shares)
                    elif ref in self.pinged_actors:
                        self.on_actor_alive(ref)
                    elif ref in self.pending_actors:
                        self.on_actor_started(ref)
                    elif ref in self.helper_refs:
                        self.on_helper_done(ref)
                    else:
                        task, actors, _ = self.running[ref]
                        result = self.on_task_done(ref, actors, task, num_failures, overdue)
                        del self.running[ref]  # after the call: if it raises, `finally` must find the actors
                        shares.pop(task.key, None)
                        if result is not None:
                            yield task.key, result
        except OSError as error:
            if error.errno is not None or isinstance(error, RayTaskError):  # not Ray's own
                raise
            raise UserError(
                f"this machine's Ray node is gone ({first_line(error)}). Once a node runs here again, the same command "
                "goes on from here"
            ) from None
        finally:  # after an error, or when the caller stops iterating, nobody waits for the running tasks
            for _, actors, _ in self.running.values():
                kill_actors(actors)
            self.running.clear()
            self.helper_refs.clear()
            if self.workers.scale_up_timeout:  # actors that are still pending would only make the cluster grow
                kill_actors(self.pending_actors.values())
                self.pending_actors.clear()

    def report_waiting(self, seconds: float) -> None:
        """Report that no task runs and what a worker needs.

        Args:
            seconds: Seconds without any running task.

        Raises:
            UserError: No node can hold a worker, and the time allowed for new nodes has passed.
        """
        nodes = node_resources()
        if seconds > (self.workers.scale_up_timeout or NODE_LOSS_GRACE_S):
            require_capacity(self.need, nodes, self.workers.fsdp)
        free = format_resources(ray.available_resources())
        self.callback.on_message(
            f"waiting for the cluster for {seconds:.0f} s: a worker asks for {format_resources(self.need)}; "
            f"free on all {len(nodes)} nodes together: {free}"
        )

    def wait(self, progress_refs: Iterable[Any]) -> list[Any]:
        """References that have become ready, after at most `POLL_INTERVAL_S` seconds."""
        refs = [*self.running, *self.helper_refs, *self.pinged_actors, *self.pending_actors, *progress_refs]
        if not refs:
            time.sleep(POLL_INTERVAL_S)
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=POLL_INTERVAL_S)
        return list(ready)

    def dispatch(self, open_tasks: Callable[[], Iterable[RemoteTask]], shares: dict[Any, float]) -> None:
        """Send the tasks that do not run yet to idle actors; surplus actors are shared out evenly.

        Args:
            open_tasks: As in `run`.
            shares: Share in [0, 1] of each running task that is done, by key; a dispatched task is added with 0.
        """
        if not self.idle:
            return
        running = {task.key for task, _, _ in self.running.values()}
        waiting = list(islice((task for task in open_tasks() if task.key not in running), len(self.idle)))
        max_workers = [task.max_workers for task in waiting]
        if self.shared_wait.should_wait(max_workers, bool(self.pending_actors or self.pinged_actors), time.monotonic()):
            return
        for task, count in zip(waiting, dispatch.share_workers(max_workers, len(self.idle)), strict=True):
            actors = [self.idle.pop() for _ in range(count)]
            leader, *helpers = task.send(actors)
            self.running[leader] = (task, actors, time.monotonic())
            self.helper_refs |= dict.fromkeys(helpers, leader)
            shares[task.key] = 0.0

    def poll_progress(self, progress_refs: dict[Any, Any]) -> None:
        """Ask the next busy actors for their progress, except those that have not answered the last request.

        Args:
            progress_refs: Task key by reference of a request without an answer; new requests are added.
        """
        refs = {task.key: ref for ref, (task, _, _) in self.running.items()}
        now, later = dispatch.next_to_poll(list(refs), progress_refs.values(), MAX_PROGRESS_POLLS)
        for key in now:
            _, (leader, *_), _ = self.running[refs[key]]
            progress_refs[leader.progress.options(concurrency_group="aside").remote()] = key
        self.running = {refs[key]: self.running[refs[key]] for key in later}

    def scale_up(self, open_tasks: Callable[[], Iterable[RemoteTask]]) -> None:
        """Start actors for the open tasks where the cluster has room, also on nodes that joined late."""
        if time.monotonic() - self.last_scale_up < POLL_INTERVAL_S:
            return
        self.last_scale_up = time.monotonic()
        # On an autoscaling cluster, pending actors make the cluster grow, so its present nodes are no limit.
        num_slots = self.workers.count or sys.maxsize
        if not self.workers.scale_up_timeout:
            num_slots = min(num_worker_slots(self.need, node_resources(), self.workers.fsdp), num_slots)
        demand = (task.max_workers for task in open_tasks())
        for _ in range(dispatch.num_workers_to_start(demand, num_slots, len(self.actors()))):
            actor = self.actor.remote(self.context, self.need)
            self.pending_actors[actor.__ray_ready__.remote()] = actor

    def on_actor_alive(self, ref: Any) -> None:
        """An actor of an earlier run has answered, or it died in between, which is not counted as a failure."""
        actor = self.pinged_actors.pop(ref)
        try:
            ray.get(ref)
        except RayError:
            ray.kill(actor)
        else:
            self.idle.append(actor)

    def on_actor_started(self, ref: Any) -> None:
        """An actor has started, or it failed to start.

        Raises:
            UserError: `MAX_FAILED_STARTS` actors in a row failed to start.
        """
        actor = self.pending_actors.pop(ref)
        try:
            ray.get(ref)
        except Exception as error:  # noqa: BLE001 - a start can fail with any error; the count below decides
            ray.kill(actor)
            self.failed_starts += getattr(error, "actor_init_failed", True)  # a lost node does not count
            self.callback.on_message(f"a worker did not start: {format_error(error)}")
            if self.policy.decide_start(self.failed_starts) is Decision.RAISE:
                raise UserError(
                    f"{MAX_FAILED_STARTS} workers in a row did not start; the last one said: {format_error(error)}. "
                    "Is raymask installed on every node, in the driver's version?"
                ) from None
        else:
            self.failed_starts = 0
            self.idle.append(actor)

    def on_progress(self, ref: Any, key: Any, shares: dict[Any, float]) -> None:
        """An actor has reported its progress. If it has died, its task's own reference shows that."""
        try:
            share = ray.get(ref)
        except RayError:
            return
        if key in shares:
            shares[key] = max(shares[key], share)  # a worker's share is 0 again when its task is done

    def kill_overdue(self, now: float) -> set[Any]:
        """Kill the actors of tasks that are past their timeout.

        Args:
            now: Monotonic seconds.

        Returns:
            The keys of the overdue tasks.
        """
        overdue = dispatch.overdue(
            {task.key: started + task.timeout for task, _, started in self.running.values()}, now
        )
        for task, actors, _ in self.running.values():
            if task.key in overdue:
                kill_actors(actors)
        return overdue

    def on_helper_done(self, ref: Any) -> None:
        """A helper has finished its part of a shared task. If it failed, all actors of the task are killed."""
        leader = self.helper_refs.pop(ref)
        try:
            get_result(ref)
        except SYSTEM_ERRORS:
            if leader in self.running:
                _, actors, _ = self.running[leader]
                kill_actors(actors)

    def on_task_done(
        self, ref: Any, actors: Sequence[Any], task: RemoteTask, num_failures: Counter[Any], overdue: Container[Any]
    ) -> Any | None:
        """Handle a task that has returned or failed.

        Args:
            ref: Reference of the result.
            actors: The task's actors.
            task: The task.
            num_failures: Failures so far by task key, without timeouts; updated here.
            overdue: Keys of tasks that were ended at their timeout.

        Returns:
            The task's result, or a `TaskFailed`; None when the task is tried again.

        Raises:
            Exception: The task's own error.
        """
        try:
            result = get_result(ref)
        except Exception as error:
            timed_out = task.key in overdue
            num_failures[task.key] += not timed_out
            failure = Failure(isinstance(error, SYSTEM_ERRORS), num_failures[task.key], timed_out)
            decision = self.policy.decide(failure)
            if decision is Decision.RAISE:
                raise
            kill_actors(actors)
            if isinstance(error, ObjectLostError):
                self.object_refs.clear()
            if timed_out:
                return TaskFailed(f"took longer than the timeout of {task.timeout:g} s (workers.timeout)")
            if decision is Decision.RETRY:
                self.callback.on_message(
                    f"{task.name}: its worker was lost: {format_error(error)}; trying again elsewhere"
                )
                return None
            return TaskFailed(f"its workers failed {failure.attempt} times; the last one: {format_error(error)}")
        self.failed_starts = 0
        if task.key not in overdue:  # an overdue task can still finish while its actors are killed
            self.idle.extend(actors)
        return result

    def put(self, parent: Snapshot) -> dict[str, Any]:
        """Put a snapshot's tensors into the object store, each only once while this process holds the tensors.

        Args:
            parent: The snapshot.

        Returns:
            Object references by `Snapshot` field: weights, optimizer, teacher; fields that are None are left out.
        """
        tensors = {"weights": parent.weights, "optimizer": parent.optimizer, "teacher": parent.teacher}
        refs = {}
        for name, packed in tensors.items():
            if packed is not None:
                if id(packed) not in self.object_refs:
                    self.object_refs[id(packed)] = ray.put(packed)
                    weakref.finalize(packed, self.object_refs.pop, id(packed), None)
                    self.callback.on_object_put(packed.buffer.nbytes)
                refs[name] = self.object_refs[id(packed)]
        return refs


def kill_actors(actors: Iterable[Any]) -> None:
    """Kill actors, whether they are busy or not."""
    for actor in actors:
        ray.kill(actor)


def get_result(ref: Any) -> Any:
    """What a worker returned.

    Raises:
        UserError: The worker raised it; it is unwrapped from Ray's error.
        Exception: Any other error, as Ray reports it.
    """
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def format_error(error: BaseException) -> str:
    """The one relevant line of a Ray error, at most 200 characters, without Ray's advice."""
    text = str(getattr(error, "cause", None) or error).strip() or type(error).__name__
    lines = text.splitlines()
    init_failed = getattr(error, "actor_init_failed", False)
    if isinstance(error, RayActorError) and not init_failed:
        return "its process or node died"
    # A worker's own error stands below the traceback, unindented, as `ValueError: ...`.
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*: ", line)]
    line = raised[-1] if raised and init_failed else lines[0]
    return line[:200]
