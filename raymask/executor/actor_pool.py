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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from raymask.core.callbacks import Callback
from raymask.core.errors import UserError, first_line
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


@dataclass
class RunningTask:
    """An attempt at a task.

    Attributes:
        task: The task.
        actors: The actors that work on it.
        started: When it was sent, in monotonic seconds.
        share: Share in [0, 1] that is done.
        is_polled: Whether it has not answered the last request for its progress.
        timed_out: Whether its actors were killed at the timeout.
    """

    task: RemoteTask
    actors: Sequence[Any]
    started: float
    share: float = 0.0
    is_polled: bool = False
    timed_out: bool = False


class WorkerPool:
    """Ray actors on all free worker slots of the cluster, and the loop that keeps them busy.

    Attributes:
        callback: Receives progress, messages and the sizes of objects put into the object store.
        workers: The spec's `workers` section.
        need: Resources of one worker process.
        idle: Actors without a task.
        starting: Actor by the reference that is ready once the actor has started.
        pinged: Actor of an earlier phase by the reference that is ready once the actor answers that it is alive.
        running: Running task by key, the least recently polled first.
        pending: What to do when a reference is ready, by reference. It returns a task's key and result, or None.
        num_failures: Failures in this phase by task key.
        object_refs: Object reference by `id` of the packed tensors that were put into the object store.
        context: Object reference of the worker context.
        actor: The actor class.
    """

    def __init__(self, context: WorkerContext, callback: Callback) -> None:
        """Prepare the pool; actors start with the first task.

        Args:
            context: What every worker needs; it is put into the object store.
            callback: Receives progress and messages.

        Raises:
            UserError: No node can hold a worker and the spec does not wait for the cluster to scale up.
        """
        self.callback = callback
        self.workers = context.spec.workers
        self.need = resources_per_worker(context, node_resources())
        self.policy = FailurePolicy(self.workers.max_retries, MAX_FAILED_STARTS)
        self.shared_wait = SharedTaskWait(SHARED_TASK_WAIT_S)
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self.pinged: dict[Any, Any] = {}
        self.running: dict[Any, RunningTask] = {}
        self.pending: dict[Any, Callable[[Any], tuple[Any, Any] | None]] = {}
        self.num_failures = Counter[Any]()
        self.object_refs: dict[int, Any] = {}
        self.last_scale_up = self.last_poll = 0.0
        self.failed_starts = 0
        self.starvation: Starvation | None = None  # None between two phases
        self.ping_deadline = 0.0
        if not self.workers.scale_up_timeout:
            require_capacity(self.need, node_resources(), self.workers.fsdp)
        config_module = type(context.config).__module__
        if config_module.startswith(REMOTE_CODE):  # the node that unpickles it may not have the module
            ray.cloudpickle.register_pickle_by_value(sys.modules[config_module])
        self.context = ray.put(context)
        self.actor = actor_class(self.need)

    def close(self) -> None:
        """Kill all actors."""
        waiting = [*self.idle, *self.starting.values(), *self.pinged.values()]
        kill_actors([*waiting, *(actor for running in self.running.values() for actor in running.actors)])

    def num_actors(self) -> int:
        """How many actors there are: idle, starting, not yet known to be alive, and busy."""
        num_busy = sum(len(running.actors) for running in self.running.values())
        return len(self.idle) + len(self.starting) + len(self.pinged) + num_busy

    def running_tasks(self) -> list[RemoteTask]:
        """The tasks that run now."""
        return [running.task for running in self.running.values()]

    def next_result(self, tasks: Sequence[RemoteTask]) -> tuple[Any, Any]:
        """Keep the actors busy until a task ends.

        Args:
            tasks: The tasks worth doing now, at least one, the most urgent first. Those that run are not sent again.

        Returns:
            The key of a task that has ended, of these or of an earlier call's, and its result or a `TaskFailed`.

        Raises:
            UserError: No worker can start or run, or this machine's Ray node is gone.
            Exception: A task's own error, as its worker raised it.
        """
        if self.starvation is None:
            self.begin_phase()
        finished = None
        try:
            while finished is None:
                self.scale_up(tasks)
                self.dispatch(tasks)
                self.poll()
                for ref in self.wait():
                    finished = self.pending.pop(ref)(ref)
        except OSError as error:
            if error.errno is not None or isinstance(error, RayTaskError):  # not Ray's own
                raise
            raise UserError(
                f"this machine's Ray node is gone ({first_line(error)}). Once a node runs here again, the same command "
                "goes on from here"
            ) from None
        finally:
            if finished is None:  # after an error no one waits for the tasks that still run
                self.cancel()
        return finished

    def begin_phase(self) -> None:
        """Ask the actors of the phase before whether they are alive: some may have died since."""
        now = time.monotonic()
        self.starvation = Starvation(NO_WORKER_WARNING_S, now, now)
        self.ping_deadline = now + ACTOR_PING_TIMEOUT_S
        for actor in self.idle:
            ref = actor.__ray_ready__.remote()
            self.pinged[ref] = actor
            self.pending[ref] = self.on_actor_alive
        self.idle = []

    def cancel(self) -> None:
        """End a phase: kill the actors of the tasks that still run, for which no one waits."""
        for running in self.running.values():
            kill_actors(running.actors)
        self.running.clear()
        self.num_failures.clear()
        self.starvation = None
        if self.workers.scale_up_timeout:  # actors that are still starting would only make the cluster grow
            kill_actors(self.starting.values())
            self.starting.clear()
        waiting = self.starting.keys() | self.pinged.keys()
        self.pending = {ref: handler for ref, handler in self.pending.items() if ref in waiting}

    def wait(self) -> list[Any]:
        """References that have become ready, after at most `POLL_INTERVAL_S` seconds."""
        if not self.pending:
            time.sleep(POLL_INTERVAL_S)
            return []
        ready, _ = ray.wait(list(self.pending), num_returns=1, timeout=POLL_INTERVAL_S)
        return list(ready)

    def scale_up(self, tasks: Sequence[RemoteTask]) -> None:
        """Start actors for the tasks where the cluster has room, also on nodes that joined late."""
        if time.monotonic() - self.last_scale_up < POLL_INTERVAL_S:
            return
        self.last_scale_up = time.monotonic()
        # On an autoscaling cluster, starting actors make the cluster grow, so its present nodes are no limit.
        num_slots = self.workers.count or sys.maxsize
        if not self.workers.scale_up_timeout:
            num_slots = min(num_worker_slots(self.need, node_resources(), self.workers.fsdp), num_slots)
        demand = (task.max_workers for task in tasks)
        for _ in range(dispatch.num_workers_to_start(demand, num_slots, self.num_actors())):
            actor = self.actor.remote(self.context, self.need)
            ref = actor.__ray_ready__.remote()
            self.starting[ref] = actor
            self.pending[ref] = self.on_actor_started

    def dispatch(self, tasks: Sequence[RemoteTask]) -> None:
        """Send the tasks that do not run yet to idle actors; surplus actors are shared out evenly."""
        if not self.idle:
            return
        waiting = list(islice((task for task in tasks if task.key not in self.running), len(self.idle)))
        max_workers = [task.max_workers for task in waiting]
        if self.shared_wait.should_wait(max_workers, bool(self.starting or self.pinged), time.monotonic()):
            return
        for task, count in zip(waiting, dispatch.share_workers(max_workers, len(self.idle)), strict=True):
            actors = [self.idle.pop() for _ in range(count)]
            running = self.running[task.key] = RunningTask(task, actors, time.monotonic())
            leader, *helpers = task.send(actors)
            self.pending[leader] = partial(self.on_task_done, running)
            self.pending |= dict.fromkeys(helpers, partial(self.on_helper_done, running))

    def poll(self) -> None:
        """From time to time: report progress, ask for more, warn of starvation, end what is overdue."""
        now = time.monotonic()
        if now - self.last_poll <= POLL_INTERVAL_S or self.starvation is None:
            return
        self.last_poll = now
        in_order = sorted(self.running.values(), key=lambda running: running.started)
        self.callback.on_progress({running.task.name: running.share for running in in_order})
        self.poll_progress()
        waited = self.starvation.observe(bool(self.running), now)
        if waited is not None:
            self.report_waiting(waited)
        self.kill_overdue(now)
        if now > self.ping_deadline:
            kill_actors(self.pinged.values())

    def poll_progress(self) -> None:
        """Ask the next busy actors for their progress, except those that have not answered the last request."""
        unanswered = [key for key, running in self.running.items() if running.is_polled]
        now, later = dispatch.next_to_poll(list(self.running), unanswered, MAX_PROGRESS_POLLS)
        for key in now:
            running = self.running[key]
            running.is_polled = True
            ref = running.actors[0].progress.options(concurrency_group="aside").remote()
            self.pending[ref] = partial(self.on_progress, running)
        self.running = {key: self.running[key] for key in later}

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

    def kill_overdue(self, now: float) -> None:
        """Kill the actors of tasks that are past their timeout.

        Args:
            now: Monotonic seconds.
        """
        deadlines = {key: running.started + running.task.timeout for key, running in self.running.items()}
        for key in dispatch.overdue(deadlines, now):
            self.running[key].timed_out = True
            kill_actors(self.running[key].actors)

    def on_actor_alive(self, ref: Any) -> None:
        """An actor of an earlier phase has answered, or it died in between, which is not counted as a failure."""
        actor = self.pinged.pop(ref)
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
        actor = self.starting.pop(ref)
        try:
            ray.get(ref)
        except Exception as error:  # noqa: BLE001 - a start can fail with any error; the count below decides
            ray.kill(actor)
            self.failed_starts += getattr(error, "actor_init_failed", True)  # a lost node does not count
            self.callback.on_message(f"a worker did not start: {format_ray_error(error)}")
            if self.policy.decide_start(self.failed_starts) is Decision.RAISE:
                raise UserError(
                    f"{MAX_FAILED_STARTS} workers in a row did not start; the last one said: "
                    f"{format_ray_error(error)}. Is raymask installed on every node, in the driver's version?"
                ) from None
        else:
            self.failed_starts = 0
            self.idle.append(actor)

    def on_progress(self, running: RunningTask, ref: Any) -> None:
        """An actor has reported its progress. If it has died, its task's own reference shows that."""
        running.is_polled = False
        try:
            running.share = max(running.share, ray.get(ref))  # a worker's share is 0 again when its task is done
        except RayError:
            return

    def on_helper_done(self, running: RunningTask, ref: Any) -> None:
        """A helper has finished its part of a shared task. If it failed, all actors of the task are killed."""
        try:
            get_result(ref)
        except SYSTEM_ERRORS:
            if self.running.get(running.task.key) is running:
                kill_actors(running.actors)

    def on_task_done(self, running: RunningTask, ref: Any) -> tuple[Any, Any] | None:
        """A task has returned or failed.

        Returns:
            The task's key and its result or a `TaskFailed`; None when the task is tried again.

        Raises:
            Exception: The task's own error.
        """
        key = running.task.key
        try:
            result = get_result(ref)
        except Exception as error:  # noqa: BLE001 - the policy decides, and raises the task's own errors
            result = self.on_task_failed(running, error)
        else:
            self.failed_starts = 0
            if not running.timed_out:  # an overdue task can still finish while its actors are killed
                self.idle.extend(running.actors)
        del self.running[key]
        return None if result is None else (key, result)

    def on_task_failed(self, running: RunningTask, error: Exception) -> TaskFailed | None:
        """Retry a task, record its failure, or raise its own error.

        Returns:
            The failure; None when the task is tried again.
        """
        task = running.task
        self.num_failures[task.key] += 1
        failure = Failure(isinstance(error, SYSTEM_ERRORS), self.num_failures[task.key], running.timed_out)
        decision = self.policy.decide(failure)
        if decision is Decision.RAISE:
            raise error
        kill_actors(running.actors)
        if isinstance(error, ObjectLostError):
            self.object_refs.clear()
        if running.timed_out:
            return TaskFailed(f"took longer than the timeout of {task.timeout:g} s (workers.timeout)")
        if decision is Decision.RETRY:
            self.callback.on_message(
                f"{task.name}: its worker was lost: {format_ray_error(error)}; trying again elsewhere"
            )
            return None
        return TaskFailed(f"its workers failed {failure.attempt} times; the last one: {format_ray_error(error)}")

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


def format_ray_error(error: BaseException) -> str:
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
