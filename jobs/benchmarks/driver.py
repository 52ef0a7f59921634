"""Cost of the driver: its time beside Ray Tune's, idle workers, and bytes over the wire."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import ray
from harness import Finding, options, run_halving, tell
from ray import tune

from raymask.config import make_spec
from raymask.core.callbacks import Callback
from raymask.core.masking.noise import Noise
from raymask.core.records import Candidate, EvalPoint, Evaluation
from raymask.core.tasks import EvalTask, Snapshot
from raymask.core.tensors import PackedTensors
from raymask.executor import connection, ray_executor, worker_actor
from raymask.machine import usable_cpus
from raymask.runs.run_dir import RunDir

ROWS, LOOKS = 370, 10  # of MRPC's `validation` split, and on a curve
NOISE = Noise(exponent=5.0, sampling_ratio=3e-4)
PRUNABLE = 12 * (4 * 768 * 768 + 2 * 768 * 3072)  # entries of BERT-base
PARENT = Snapshot("search-1-0123456789abcdef", PackedTensors(np.zeros(64, np.uint8), {}))


def stand_in(count: int, **more: Any) -> Any:
    """What the pool asks of a WorkerContext, for `count` workers on two CPUs; it is unpickled without torch."""
    workers = {"count": count, "cpus": 2 / count, "gpus": 0}
    spec = make_spec({"model": "quickstart", "task": "quickstart", "workers": workers})
    return SimpleNamespace(spec=spec, config=None, peak_host_memory=lambda on_gpu: 2**24, **more)


def candidate(index: int, noise: Noise | None = NOISE) -> Candidate:
    return Candidate(level=1, index=index, seed=index << 40, density=1 / 16, noise=noise)


def evaluation(index: int) -> Evaluation:
    """As large as a real one."""
    return Evaluation(
        candidate=candidate(index),
        score=-0.5123456789,
        curve=tuple(EvalPoint(step=50 * look, loss=1 / (look + 1), metric=0.87654321) for look in range(LOOKS)),
        row_losses=np.linspace(0, 1, ROWS, dtype=np.float32).tobytes(),
        distance=0.123456789,
        digest="0123456789abcdef" * 2,
        seconds=1.23456789,
        worker="a-node/123456 cpu 1 threads bf16",
    )


class Clerk:
    """In the place of WorkerActor: answers at once."""

    def __init__(self, job: Any, on_gpu: bool) -> None:
        pass

    def progress(self) -> float:
        return 0.0

    def evaluate(self, key: str, refs: Mapping[str, Any], eval_task: EvalTask, paused: Any) -> tuple[Any, None]:
        return evaluation(eval_task.candidate.index), None


class Sleeper(Clerk):
    """Instead of WorkerActor: sleeps `job.seconds` over a candidate, over a magnitude mask until all workers do."""

    def __init__(self, job: Any, on_gpu: bool) -> None:
        self.context = job
        # Records speak of tensors but hold none, and without torch a process needs a quarter of the memory.
        tensors = ModuleType("raymask.core.tensors")
        vars(tensors)["PackedTensors"] = object
        sys.modules[tensors.__name__] = tensors

    def evaluate(self, key: str, refs: Mapping[str, Any], eval_task: EvalTask, paused: Any) -> tuple[Any, None]:
        from raymask.core.records import Evaluation

        started, candidate = time.perf_counter(), eval_task.candidate
        if candidate.is_magnitude:
            (self.context.gate / str(os.getpid())).touch()
            while len(list(self.context.gate.iterdir())) < self.context.spec.workers.count:
                time.sleep(0.1)
        else:
            time.sleep(self.context.seconds)
        seconds = time.perf_counter() - started
        worker = str(os.getpid())
        return Evaluation(candidate=candidate, row_losses=bytes(4 * ROWS), seconds=seconds, worker=worker), None


def trial(config: dict[str, Any]) -> dict[str, Any]:
    """What Clerk does, as a function that Ray Tune calls."""
    found = evaluation(config["index"])
    return {"score": found.score, "evaluation": found}


def tune_seconds(trials: int, *, fast: bool) -> float:
    """Seconds that Tune takes for a trial, two at a time; `fast`: it keeps its processes and writes no logs."""
    quiet = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": str(int(fast))}
    with TemporaryDirectory() as folder, connection.set_environment(**quiet):
        started = time.perf_counter()
        results = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"index": tune.grid_search(list(range(trials)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=2, reuse_actors=fast),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        seconds = time.perf_counter() - started
        assert len(results) == trials
        assert not results.num_errors
    return seconds / trials


def loopback() -> int:
    """Bytes that this machine has sent to itself so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def costs(count: int, trials: int, pause: float) -> None:
    """Time and bytes of `count` candidates, and the time of Tune's trials, `trials` of them when each is a process."""
    with mock.patch.object(worker_actor, "WorkerActor", Clerk), TemporaryDirectory() as folder:
        with ray_executor.RayExecutor(stand_in(2), Callback(), None) as executor:
            list(run_halving(executor, PARENT, [candidate(index) for index in range(10)]))
            before = loopback()
            time.sleep(pause)  # which also lets the second worker start
            idle = (loopback() - before) / pause
            journal, before, started = RunDir(folder), loopback(), time.perf_counter()
            for found in run_halving(executor, PARENT, [candidate(index) for index in range(count)]):
                journal.append(found)  # as a search does
            ours = time.perf_counter() - started
            wire = (loopback() - before - idle * ours) / count
        assert len(journal.evaluations(1)) == count
    tell_time(count, ours / count, tune_seconds(trials, fast=False), tune_seconds(count, fast=True), trials)
    tell_bytes(wire, idle)


def tell_time(count: int, ours: float, theirs: float, fast: float, trials: int) -> None:
    """Seconds a candidate and a trial."""
    what = f"driver's time for one of {count:,} candidates of no work, on 2 workers"
    note = (
        "with the journal on disk; Tune as it comes: a process, its imports and three logs a trial; scaled up from "
        f"{trials} trials"
    )
    met = ours <= 0.005 and theirs >= 20 * ours
    tell(Finding(what, "a Ray Tune trial", 1e3 * ours, 1e3 * theirs, "ms", theirs / ours, "<= 5 ms, 20x", met, note))
    what, against = "the same", "a Ray Tune trial with reuse_actors, without logs"
    note = f"{count:,} trials with Tune's own start"
    tell(Finding(what, against, 1e3 * ours, 1e3 * fast, "ms", fast / ours, "less", ours < fast, note))


def tell_bytes(wire: float, idle: float) -> None:
    """Bytes a candidate: sent and returned as Ray pickles them, and both as the loopback device counted them."""
    refs = {name: ray.put(0) for name in ("weights", "optimizer", "teacher")}
    down = len(ray.cloudpickle.dumps((PARENT.key, refs, candidate(1))))
    up = len(ray.cloudpickle.dumps(evaluation(1)))
    mask, weights = PRUNABLE / 8, 4 * PRUNABLE
    what, note = "sent to a worker for a candidate", "pickled: the parent's key, three references, the candidate"
    tell(Finding(what, "BERT-base's mask", down / 1e3, mask / 1e3, "KB", mask / down, "<= 2 KB", down <= 2000, note))
    what, note = "returned by a worker for a candidate", f"pickled: {ROWS} row losses, {LOOKS} looks"
    tell(
        Finding(what, "BERT-base's weights", up / 1e3, weights / 1e3, "KB", weights / up, "<= 20 KB", up <= 20000, note)
    )
    what, both = "on the loopback device for a candidate, both ways", mask + weights
    note = f"with all that Ray says beside it, less the {idle / 1e3:.0f} KB/s that it says anyhow"
    tell(Finding(what, "mask and weights", wire / 1e3, both / 1e3, "KB", both / wire, "<= 22 KB", wire <= 22000, note))


@contextmanager
def bare_ray() -> Iterator[None]:
    """A private Ray on two CPUs like that of connection.ray_connection, but whose processes have imported nothing."""
    private = {
        "RAY_ADDRESS": "",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    prefix = f"{connection.SESSION_PREFIX}{os.getpid()}-"
    with (
        TemporaryDirectory(prefix=prefix, dir=connection.RAY_DIR, ignore_cleanup_errors=True) as folder,
        connection.set_environment(**private),
        connection.keep_loopback_address(),
    ):
        connection.reread_environment()
        with connection.quiet_ray_init():
            ray.init(
                "local",
                num_cpus=2,  # it starts as many processes at a time
                object_store_memory=2**27,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
        try:
            yield
        finally:
            ray.shutdown()


def busy(count: int, evaluations: int, seconds: float) -> None:
    """The share of their time that `count` workers spend on `evaluations` of so many seconds, once all have started."""
    with TemporaryDirectory() as gate, mock.patch.object(worker_actor, "WorkerActor", Sleeper):
        job = stand_in(count, gate=Path(gate), seconds=seconds)
        with ray_executor.RayExecutor(job, Callback(), None) as executor:
            list(run_halving(executor, PARENT, [candidate(index, None) for index in range(count)]))
            started, computing = time.perf_counter(), time.process_time()
            found = list(run_halving(executor, PARENT, [candidate(index) for index in range(evaluations)]))
            wall, computing = time.perf_counter() - started, time.process_time() - computing
    assert len(found) == evaluations
    assert len({one.worker for one in found}) == count
    share = sum(one.seconds for one in found) / (count * wall)
    what = f"{count} workers, {evaluations} early evaluations of {seconds:g} s: busy"
    note = (
        f"simulated, all on the driver's {usable_cpus()} cores; the driver computes for {computing / wall:.0%} of "
        f"{wall:.1f} s, which include the first dispatch and the last workers' wait for each other"
    )
    tell(Finding(what, "all the time", share, 1.0, "of the time", None, ">= 0.95", share >= 0.95, note))


if __name__ == "__main__":
    quick = options(__doc__).quick
    with bare_ray():
        costs(*((100, 2, 1.0) if quick else (1000, 10, 3.0)))
        busy(*((8, 64, 0.25) if quick else (64, 1024, 1.0)))
