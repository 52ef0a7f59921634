"""Callbacks that record what they are told, workers that are killed, and comparisons of results."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import ray
from support.builders import tiny_context

from raymask.core.callbacks import Callback
from raymask.core.records import Evaluation
from raymask.core.tasks import Checkpoint
from raymask.executor import connection

import psutil  # isort: skip - Ray brings it along, so it is found once Ray is imported

PATIENCE = 60.0  # seconds after which something that must happen counts as never happening


@dataclass
class RecordingCallback(Callback):
    """A Callback that writes down what it is told, in the order in which it comes.

    Attributes:
        notes: Every note.
        shares: Every progress report: shares in [0, 1] by name.
    """

    notes: list[str] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    def on_message(self, text: str) -> None:
        self.notes.append(text)

    @property
    def troubles(self) -> list[str]:
        """The notes on workers that were lost or did not start."""
        return [text for text in self.notes if "worker was lost" in text or "did not start" in text]

    def on_progress(self, shares: Mapping[str, float]) -> None:
        self.shares.append(dict(shares))


@dataclass
class Killer(RecordingCallback):
    """Signals the workers, or `together` of them, in the middle of `name`, a number of `times`, each a new process."""

    name: str = "candidate 1"
    times: int = 1
    together: int | None = None
    signal: int = signal.SIGKILL
    hit: list[int] = field(default_factory=list)

    def on_progress(self, shares: Mapping[str, float]) -> None:
        super().on_progress(shares)
        noticed = not self.together or len(self.hit) <= len(self.troubles)  # else its partners are still there
        if shares.get(self.name, 0.0) > 0.0 and len(self.hit) < self.times and noticed:
            for pid in [pid for pid in worker_pids() if pid not in self.hit][: self.together]:
                os.kill(pid, self.signal)
                self.hit.append(pid)


def family() -> list[psutil.Process]:
    """The processes that this one has started, and theirs."""
    return psutil.Process().children(recursive=True)


def worker_pids() -> list[int]:
    """Process ids of the workers among them, those of trials of Ray Tune included."""
    found = []
    for process in family():
        with suppress(psutil.NoSuchProcess, IndexError):
            if process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[0].startswith("ray::WorkerActor"):
                found.append(process.pid)
    return found


def wait_until(happened: Callable[[], object]) -> None:
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < PATIENCE, "waited too long"
        time.sleep(0.05)


@contextmanager
def private_ray(cpus: int = 1) -> Iterator[None]:
    """This process connected to a private Ray as a search would start it, with so many CPUs whatever there are."""
    before = ray.init

    def init(*arguments: Any, **options: Any) -> Any:
        return before(*arguments, **options | {"num_cpus": cpus})

    assert not ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", init)
        with connection.ray_connection(tiny_context(), None):
            yield


def result(evaluation: Evaluation) -> Evaluation:
    """What must not depend on where and how fast it was computed."""
    return evaluation.model_copy(update={"started": 0.0, "seconds": 0.0, "worker": ""})


def by_place(evaluations: Iterable[Evaluation]) -> dict[tuple[int, int], Evaluation]:
    """Results by candidate and rung, each of which comes once."""
    found: dict[tuple[int, int], Evaluation] = {}
    for evaluation in evaluations:
        place = evaluation.candidate.index, evaluation.rung
        assert place not in found
        found[place] = result(evaluation)
    return found


def pid_of(evaluation: Evaluation) -> int:
    return int(evaluation.worker.split()[0].split("/")[1])


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    """Bit for bit."""
    for mine, theirs in [(one.weights, other.weights), (one.optimizer, other.optimizer), (one.mask, other.mask)]:
        assert mine.index == theirs.index
        assert np.array_equal(mine.buffer, theirs.buffer)
    assert (one.digest, one.num_kept, one.num_prunable) == (other.digest, other.num_kept, other.num_prunable)
    assert (one.finetune_result.curve, one.finetune_result.best) == (
        other.finetune_result.curve,
        other.finetune_result.best,
    )
    assert np.array_equal(one.test_outputs, other.test_outputs)
