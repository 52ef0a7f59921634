"""A simulated Ray with a clock of its own: the calls that the worker pool makes, without processes or waiting."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, repeat
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from ray.exceptions import RayActorError

from raymask.config import make_spec
from raymask.core.callbacks import Callback
from raymask.core.records import Evaluation
from raymask.core.tasks import EvalTask, FinetuneTask
from raymask.executor import actor_pool, ray_executor
from raymask.train.process_group import ProcessGroup

LONG = 1e4  # seconds that no test's work takes


@dataclass(eq=False)
class Ref:
    """An object reference: not ready, or ready with a value or an error.

    `kind`: what was called, a key of a `Task` among them.
    """

    kind: Any
    outcome: Any = None
    ready: bool = False

    def complete(self, outcome: Any) -> None:
        if not self.ready:
            self.outcome, self.ready = outcome, True


@dataclass(frozen=True)
class Task:
    """Work that takes `seconds`; its attempts end with `outcomes`, the last one again and again: values or errors.

    `helper_error`: what its helpers end with, halfway.
    """

    key: Any
    seconds: float = 1.0
    outcomes: tuple[Any, ...] = ("done",)
    timeout: float = 1e9
    max_workers: int = 1
    helper_error: Exception | None = None


@dataclass(eq=False)
class Actor:
    """A worker on a node; dead ones answer with RayActorError, and those that hang not at all."""

    ray: FakeRay
    node: int
    alive: bool = True
    hangs: bool = False
    refs: list[Ref] = field(default_factory=list)

    def later(self, kind: Any, seconds: float, outcome: Any) -> Ref:
        ref = Ref(kind)
        if not self.alive:
            ref.complete(RayActorError())
            return ref
        self.refs.append(ref)
        if not self.hangs:
            self.ray.at(self.ray.now + seconds, lambda: ref.complete(outcome))
        return ref

    def die(self) -> None:
        self.alive = False
        for ref in self.refs:
            ref.complete(RayActorError())

    def __getattr__(self, name: str) -> Any:
        if name == "__ray_ready__":
            return SimpleNamespace(remote=lambda: self.ray.started(self))
        if name == "progress":
            asked = SimpleNamespace(remote=lambda: self.later("progress", 0.0, next(self.ray.progress)))
            return SimpleNamespace(options=lambda concurrency_group: asked)
        if name == "evaluate":
            evaluate = SimpleNamespace(remote=self.run_evaluation)
            return SimpleNamespace(options=lambda num_returns: evaluate)
        if name == "finetune":
            return SimpleNamespace(remote=self.run_finetuning)
        if name == "open_rendezvous":
            return SimpleNamespace(remote=lambda: Ref("rendezvous"))
        raise AttributeError(name)

    def run_evaluation(self, key: str, refs: Any, eval_task: EvalTask, paused: Sequence[Ref]) -> tuple[Ref, Ref]:
        self.ray.order.append(eval_task.key)
        self.ray.below.append([ref.kind for ref in paused])
        return self.later(eval_task.key, 1.0, self.ray.scored(eval_task)), Ref(("pause", eval_task.key))

    def run_finetuning(
        self, key: str, refs: Any, finetune_task: FinetuneTask, member: ProcessGroup, rendezvous: Ref | None
    ) -> Ref:
        self.ray.order.append(finetune_task.name)
        return self.later(finetune_task.name, self.ray.finetune_seconds, self.ray.finetuned)


class FakeRay:
    """Nodes, actors and references; `install` puts it in the place of Ray and of the clock in the pool's module.

    Attributes:
        cpus: CPUs by node; an actor takes one, and waits until there is one.
        now: Seconds since the beginning.
        start_seconds: What an actor takes to start.
        start_errors: What the next actors die of while they start, one each.
        attempts: Attempts by task key.
        order: Task keys in the order in which they were dispatched.
        most: The most actors that lived at once.
        progress: What workers say when they are asked how far they are.
        below: Of every early evaluation, what it was given to go on from.
        scored: Result of an early evaluation, which takes a second: a value or an error.
        finetuned: Result of every fine-tuning, which takes `finetune_seconds`.
    """

    def __init__(self, cpus: Sequence[int], start_seconds: float = 1.0) -> None:
        self.cpus = dict(enumerate(cpus))
        self.now, self.start_seconds = 0.0, start_seconds
        self.start_errors: Iterator[Exception | None] = iter(())
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers, self.node_numbers = count(), count(len(cpus))
        self.actors: list[Actor] = []
        self.unplaced: list[tuple[Actor, Ref]] = []
        self.attempts, self.order, self.most = Counter[Any](), list[Any](), 0
        self.progress: Iterator[float] = repeat(0.5)
        self.below: list[list[Any]] = []
        self.scored: Callable[[EvalTask], Any] = lambda eval_task: Evaluation(
            candidate=eval_task.candidate, rung=eval_task.rung, repeat=eval_task.repeat, score=0.5
        )
        self.finetuned: Any = "checkpoint"
        self.finetune_seconds = 1.0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(actor_pool, "ray", self)
        patch.setattr(actor_pool, "time", self)
        for module in (actor_pool, ray_executor):
            patch.setattr(module, "node_resources", self.nodes)
        patch.setattr(actor_pool, "actor_class", lambda need: SimpleNamespace(remote=self.start))

    def pool(self, callback: Callback | None = None, **workers: Any) -> actor_pool.WorkerPool:
        spec = make_spec({"model": "quickstart", "task": "quickstart", "workers": workers | {"gpus": 0}})
        return actor_pool.WorkerPool(
            SimpleNamespace(spec=spec, config=None, peak_host_memory=lambda on_gpu: 0.0), callback or Callback()
        )

    @contextmanager
    def executor(self, callback: Callback | None = None, **sections: Any) -> Iterator[ray_executor.RayExecutor]:
        """An executor with simulated workers."""
        workers = sections.pop("workers", {}) | {"gpus": 0}
        spec = make_spec({"model": "quickstart", "task": "quickstart", "workers": workers, **sections})
        job: Any = SimpleNamespace(spec=spec, config=None, peak_host_memory=lambda on_gpu: 0.0)
        with (
            mock.patch.object(ray_executor, "ray_connection", return_value=nullcontext()),
            ray_executor.RayExecutor(job, callback or Callback(), None) as found,
        ):
            yield found

    def run(self, pool: actor_pool.WorkerPool, tasks: Iterable[Task]) -> dict[Any, Any]:
        """What the pool makes of the tasks, by key, in the order in which they end."""
        missing = {task.key: task for task in tasks}
        results: dict[Any, Any] = {}
        while missing:
            key, outcome = pool.next_result([self.call(task) for task in missing.values()])
            assert key not in results, "one result a task"
            results[key] = outcome
            del missing[key]
        pool.cancel()
        return results

    def call(self, task: Task) -> actor_pool.RemoteTask:
        def send(actors: Sequence[Actor]) -> list[Ref]:
            self.order.append(task.key)
            number = min(self.attempts[task.key], len(task.outcomes) - 1)
            self.attempts[task.key] += 1
            leader, *helpers = actors
            outcome = task.outcomes[number]
            return [
                leader.later(task.key, task.seconds, outcome),
                *(
                    helper.later(("helper", task.key), task.seconds / (1 + bool(task.helper_error)), task.helper_error)
                    for helper in helpers
                ),
            ]

        return actor_pool.RemoteTask(task.key, f"task {task.key}", task.timeout, send, task.max_workers)

    # the clock
    def at(self, when: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), happens))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert self.now < LONG, "this goes on for ever"
        self.pass_until(self.now + seconds, lambda: False)

    def pass_until(self, end: float, happened: Callable[[], bool]) -> None:
        while not happened():
            if not self.events or self.events[0][0] > end:
                self.now = end
                return
            when, _, happens = heapq.heappop(self.events)
            self.now = max(self.now, when)
            happens()
            self.place()

    # the cluster
    def nodes(self) -> list[dict[str, float]]:
        return [{"CPU": float(cpus), "GPU": 0.0, "memory": 1e12} for cpus in self.cpus.values()]

    def add_node(self, cpus: int = 1) -> None:
        self.cpus[next(self.node_numbers)] = cpus
        self.place()

    def lose_node(self, node: int) -> None:
        self.cpus.pop(node, None)
        for actor in self.actors:
            if actor.alive and actor.node == node:
                actor.die()

    def place(self) -> None:
        """Start actors where there is room."""
        for actor, ref in list(self.unplaced):
            for node, cpus in self.cpus.items():
                if sum(other.alive and other.node == node for other in self.actors) < cpus:
                    self.unplaced.remove((actor, ref))
                    if actor.alive:
                        actor.node = node
                        outcome = next(self.start_errors, None)
                        self.at(self.now + self.start_seconds, partial(ref.complete, outcome))
                    break
        self.most = max(self.most, self.living())

    def living(self) -> int:
        return sum(actor.alive and actor.node >= 0 for actor in self.actors)

    # what the pool calls
    def start(self, job: Any, need: Any) -> Actor:
        self.actors.append(Actor(self, -1))
        return self.actors[-1]

    def started(self, actor: Actor) -> Ref:
        if actor.node >= 0:
            return actor.later("start", 0.0, None)
        ref = Ref("start")
        actor.refs.append(ref)
        self.unplaced.append((actor, ref))
        self.place()
        return ref

    def put(self, value: Any) -> Ref:
        return Ref("put", value, True)

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        assert self.now < LONG, "this goes on for ever"
        self.pass_until(self.now + timeout, lambda: any(ref.ready for ref in refs))
        ready = [ref for ref in refs if ref.ready][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Ref) -> Any:
        assert ref.ready, f"waits for {ref.kind}"
        if isinstance(ref.outcome, BaseException):
            raise ref.outcome
        return ref.outcome

    def kill(self, actor: Actor) -> None:
        actor.die()
        self.place()

    def available_resources(self) -> dict[str, float]:
        return {"CPU": sum(self.cpus.values()) - self.living()}
