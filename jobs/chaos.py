"""Searches under faults: one fault a round, at a moment drawn from a seed, and a comparison of the outcomes.

    python jobs/chaos.py --rounds 50 --seed 0
    python jobs/chaos.py --minutes 2

The same search of seconds runs undisturbed in one process (what must come out), undisturbed on two raylets of this
host (how long it takes), and then once a round with one fault, continued by the same command as often as is needed.
Needs raymask with its `test` extra, and Linux.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, TypeVar

import psutil
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raymask.core.errors import UserError
from raymask.core.lineage import DENSE
from raymask.core.records import Evaluation, Result
from raymask.data import quickstart
from raymask.runs.run_dir import EXPORT, MODEL, RunDir, sha256

SPEC = """
model: model
task: {train: train.csv, test: report.csv, text: text, label: label, validation_rows: 80}
levels: [0.5, 0.9]
candidates: {count: 4, sampling_ratios: [0.005, 0.02]}
dense: {epochs: 6, batch_size: 32, learning_rate: 5.0e-3, warmup: 0.05}
early_eval: {epochs: 2, batch_size: 32, learning_rate: 5.0e-3, eval_steps: 5, score_window: 3}
finetune: {epochs: 2, batch_size: 32, learning_rate: 1.0e-3}
imp: {epochs: 2}
distill: false
precision: fp32
workers: {gpus: 0}
seed: 10  # by which the last candidates never win: one of them may hang, and the winner is the same
"""
ROWS = {"train": 480, "report": 120}
LEVELS, POOL, RETRIES = 2, 5, 3  # candidates a level, the magnitude mask among them; machine's faults that are forgiven
LOCAL = Path(__file__).resolve().parents[1] / "cluster" / "local"
ATTEMPTS = 3  # to hit a search before it has ended
STARTS = 8  # of one command, until a round counts as failed
PATIENCE = 180.0  # seconds after which something that must happen counts as never happening
STOPPING = 3.0  # seconds that Ray's Jobs API leaves a driver between SIGTERM and SIGKILL
LOOK = 0.1  # seconds between two looks
T = TypeVar("T")


class Missed(Exception):  # noqa: N818 - no error: the fault came too late, or found nobody to hit
    """The search ended before it could be disturbed."""


# --- the cluster ------------------------------------------------------------------------------------------------------


class Cluster:
    """Two raylets on this host, by cluster/local; one may be killed or another join, and `heal` makes them two again.

    Nodes are known by the names of their folders: `a` is the head's.
    """

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))  # sockets lie in it: the path must be short
        self.state = self.home / "c"
        self.port, self.dashboard, self.joined = free_port(), free_port(), 0
        self.client: dict[str, str] = {}

    def up(self) -> None:
        lines = self.script("up").splitlines()
        self.client = dict(line.removeprefix("export ").split("=", 1) for line in lines)

    def down(self) -> None:
        self.script("down")

    def script(self, name: str) -> str:
        """One of cluster/local's, run to its end; returns its stdout."""
        ports = {"PORT": str(self.port), "DASHBOARD_PORT": str(self.dashboard)}
        settings = ports | {"RAYMASK_LOCAL_CLUSTER": str(self.state), "CPUS": "1"} | NOTICED
        done = subprocess.run(
            [LOCAL / name], env=environ() | settings, capture_output=True, text=True, timeout=PATIENCE
        )
        if done.returncode:
            raise RuntimeError(f"cluster/local/{name} failed:\n{done.stderr}")
        return done.stdout

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """A driver's environment."""
        return environ() | self.client

    def join(self) -> str:
        """Add a node, whose first worker has imported what it needs before it is asked for; returns its name."""
        self.joined += 1
        name = f"n{self.joined}"
        start = ["start", f"--address={self.address}", f"--temp-dir={self.state / name}", "--num-cpus=1"]
        quiet = ["--disable-usage-stats", "--dashboard-agent-listen-port=0", "--include-log-monitor=False"]
        settings = {
            "RAYMASK_RAYLET_OF": str(self.state),  # by which `down` finds it
            "RAY_enable_worker_prestart": "1",
            "RAY_preload_python_modules": "raymask.train.worker,transformers.models.bert.modeling_bert",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
        }
        with (self.state / f"{name}.out").open("w") as log:
            subprocess.run(
                [sys.executable, "-c", ON_LOOPBACK, *start, "--node-ip-address=127.0.0.1", *quiet],
                env=self.environ | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
                timeout=PATIENCE,
            )
        return name

    def raylets(self) -> dict[str, psutil.Process]:
        """The running ones, by node."""
        found = {}
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "raylet":
                with suppress(psutil.NoSuchProcess):
                    node = re.search(rf"--temp_dir={re.escape(str(self.state))}/(\w+)", " ".join(process.cmdline()))
                    if node:
                        found[node[1]] = process
        return found

    def workers(self, node: str | None = None) -> list[psutil.Process]:
        """The searches' workers, on one node or on all."""
        found = []
        for name, raylet in self.raylets().items():
            with suppress(psutil.NoSuchProcess):
                if node in (None, name):
                    found += [child for child in raylet.children() if title(child).startswith("ray::WorkerActor")]
        return found

    def alive(self) -> int:
        """How many nodes the head believes to be alive."""
        token = Path(self.client["RAY_AUTH_TOKEN_PATH"]).read_text()
        url = f"http://127.0.0.1:{self.dashboard}/api/v0/nodes"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def heal(self) -> None:
        """Two nodes, of which everybody knows, and no worker of an earlier search."""
        try:
            self.mend()
        except (RuntimeError, OSError, subprocess.SubprocessError, psutil.NoSuchProcess):  # it is beyond that
            self.down()
            self.up()
            self.mend()

    def mend(self) -> None:
        """Replace what was lost, and send away who joined."""
        others = self.raylets()
        if others.pop("a", None) is None:
            self.down()
            self.up()
        elif not others:
            self.join()
        else:
            for late in [*others.values()][1:]:
                late.terminate()
        wait_until(lambda: self.alive() == 2 and not self.workers(), "two nodes without workers")


NOTICED = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
}
"""A lost node is known to be lost in five seconds, not in half a minute; a slow one has as long as ever to answer."""
ON_LOOPBACK = """
from ray._private import ray_constants, services
from ray.scripts import scripts
ray_constants.ENABLE_RAY_CLUSTER, services.resolve_ip_for_localhost = True, str
scripts.main()
"""
"""`ray start` as cluster/local/up calls it, which says why."""


def environ() -> dict[str, str]:
    """This process's environment with its own interpreter first in PATH, without what points to another Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(happened: Callable[[], object], what: str) -> None:
    started = time.monotonic()
    while not happened():
        if time.monotonic() - started > PATIENCE:
            raise RuntimeError(f"waited {PATIENCE:.0f} s in vain for {what}")
        time.sleep(2 * LOOK)


def title(process: psutil.Process) -> str:
    """What a process calls itself; empty when it is gone."""
    with suppress(psutil.NoSuchProcess, IndexError):
        return str(process.cmdline()[0])
    return ""


def at_work(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that compute just now. Their titles do not tell: asked how far it is, a worker forgets what it does."""
    before = {process: cpu_time(process) for process in processes}
    time.sleep(LOOK)
    return [process for process, seconds in before.items() if cpu_time(process) > seconds]


def cpu_time(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        return float(process.cpu_times().user)
    return 0.0


# --- a search ---------------------------------------------------------------------------------------------------------


class Search:
    """One search in a folder of its own: a driver's process, and the same command again after it has ended."""

    def __init__(self, folder: Path, cluster: Cluster, expected: Mapping[str, Any], *settings: str) -> None:
        self.folder, self.cluster, self.run, self.expected = folder, cluster, folder / "run", expected
        folder.mkdir(parents=True)
        self.command = [*command(folder), "--address", cluster.address, *settings]
        self.starts = 0
        self.ends: list[int] = []  # exit codes
        self.wrong: list[str] = []  # what a fault saw that must not be
        self.felled = False  # by us: the driver may end in any way
        self.damaged: Path | None = None  # a file that the next start must name, or not read
        self.hanging: psutil.Process | None = None  # a worker that was stopped
        self.known: dict[str, bytes] = {}  # what was finished when the fault came
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.felled = False
        self.driver = self.launch(f"driver-{self.starts}")

    def launch(self, name: str) -> subprocess.Popen[bytes]:
        """The command, with its output in files of that name."""
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            return subprocess.Popen(
                self.command,
                cwd=self.folder.parent,
                env=self.cluster.environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def said(self, name: str = "") -> str:
        """What a driver, by default the last one, said when it refused; empty when it did not."""
        text = (self.folder / f"{name or f'driver-{self.starts}'}.err").read_text(errors="replace")
        return text[text.find("raymask: ") :].strip() if "raymask: " in text else ""

    def lines(self) -> list[str]:
        """The first driver's lines so far, without those that depend on how fast it is."""
        text = (self.folder / "driver-1.out").read_text(errors="replace")
        return [line for line in text.splitlines() if re.match(r"\[ *[\d.]+ s\] (?!progress: )", line)]

    def until(self, found: Callable[[], T | None]) -> T:
        """What `found` returns, once it is something. Raises Missed when the search is done before."""
        started = time.monotonic()
        while self.driver.poll() is None and time.monotonic() - started < PATIENCE:
            if value := found():
                return value
            time.sleep(LOOK)
        code = self.driver.poll()
        if code != 0:
            raise RuntimeError(f"by itself the search {'hung' if code is None else f'ended with exit code {code}'}")
        raise Missed("the search had ended")

    def fell(self, how: signal.Signals) -> None:
        """End the driver, as Ray's Jobs API does when it is not killed at once. Raises Missed when it had ended."""
        if self.driver.poll() is not None:
            raise Missed("the search had ended")
        self.felled = True
        self.driver.send_signal(how)
        with suppress(subprocess.TimeoutExpired):
            self.driver.wait(STOPPING)
        self.close()

    def see_through(self) -> list[str]:
        """Run the command until the search is done, doing what refusals advise; returns what went wrong."""
        while True:
            try:
                code = self.driver.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                return [f"start {self.starts} did not end within {PATIENCE:.0f} s"]
            self.ends.append(code)
            if code == 0:
                return []
            wrong = [] if self.felled else self.follow(code, self.said())
            if wrong or self.starts == STARTS:
                return wrong or [f"not done after {STARTS} starts"]
            self.start()

    def follow(self, code: int, said: str) -> list[str]:
        """Do what a refusal advises; returns what is wrong with it."""
        if code != 2 or not said:
            return [f"start {self.starts} ended with exit code {code}"]
        if self.damaged and str(self.damaged) not in said:
            return [f"the refusal does not name {self.damaged}: {said}"]
        self.damaged = None
        if file := advised(said):
            file.unlink()
            self.known.pop(str(file.relative_to(self.run)), None)
        elif "same command goes on" not in said:
            return [f"start {self.starts} was refused: {said}"]
        return []

    def finished(self) -> dict[str, bytes]:
        """The whole lines of every journal, and every finished level's record, by file."""
        found = {str(path.relative_to(self.run)): path.read_bytes() for path in self.run.rglob("level.json")}
        for path in self.run.rglob("evaluations.jsonl"):
            data = path.read_bytes()
            found[str(path.relative_to(self.run))] = data[: data.rfind(b"\n") + 1]
        return found

    def evaluations(self) -> list[Evaluation]:
        """All levels' journals."""
        store = RunDir(self.run)
        return [evaluation for level in range(1, LEVELS + 1) for evaluation in store.evaluations(level)]

    def close(self) -> None:
        """End the driver, should it still run."""
        self.driver.kill()
        self.driver.wait()


def write_task(folder: Path) -> None:
    """The model, untrained, and the rows that the spec names by relative paths."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    BertForSequenceClassification(quickstart.config()).save_pretrained(folder / "model")
    quickstart.tokenizer().save_pretrained(folder / "model")
    for split, (texts, labels) in quickstart.sentences(0).items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            rows = list(zip(texts, labels, strict=True))[: ROWS[split]]
            csv.writer(file).writerows([("text", "label"), *rows])


def command(folder: Path) -> list[str]:
    """`raymask search` of the spec, which it writes, in a folder beside those of `write_task`."""
    spec = folder / "spec.yaml"
    spec.write_text(SPEC)
    return [sys.executable, "-m", "raymask", "search", str(spec), "--run", str(folder / "run")]


def advised(said: str) -> Path | None:
    """The file that a refusal says to delete."""
    named = re.search(r"Delete (?!it\b)(.+?) to do this level again", said)
    meant = re.match(r"raymask: (.+?): .*Delete (?:it|the file)\b", said, re.DOTALL)
    return Path(named[1]) if named else Path(meant[1]) if meant else None


# --- outcomes ---------------------------------------------------------------------------------------------------------


def outcome(run: Path) -> dict[str, Any]:
    """All that a finished search found and that nothing may change, by name, as JSON has it."""
    try:
        store = RunDir(run)
        result = store.read_result()
        return found_by(store, result) if result else {}
    except (UserError, OSError) as error:
        return {"damage": str(error)}


def found_by(store: RunDir, result: Result) -> dict[str, Any]:
    found: dict[str, Any] = {"dense weights": store.read_level(DENSE, 0).files[MODEL]}
    with store.storage.reading(f"{EXPORT}/{MODEL}") as path:
        found["export"] = sha256(path)
    for lineage, levels in (("", result.levels), ("baseline's ", result.baseline_levels)):
        for level in levels:
            name = f"{lineage}level {level.level}"
            found |= {f"{name} mask": level.digest, f"{name} weights": level.files[MODEL]}
            found[f"{name} winner"] = level.winner.candidate.name
    for number in range(1, len(result.levels) + 1):
        for evaluation in sorted(store.evaluations(number), key=lambda one: one.candidate.index):
            found[score_of(evaluation)] = evaluation.score
    for row in result.models:
        found |= {f"{row.name} {metric}": value for metric, value in row.test_metrics.items()}
    return found


def score_of(evaluation: Evaluation) -> str:
    return f"level {evaluation.candidate.level} {evaluation.candidate.name} score"


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is not bit for bit the same."""
    names = {**expected, **found}
    return [
        f"{name}: {found.get(name)} instead of {expected.get(name)}"
        for name in names
        if found.get(name) != expected.get(name)
    ]


def judge(search: Search) -> list[str]:
    """What differs from the undisturbed search, or was done twice. Raises Missed when the fault did nothing."""
    wrong = [f"{name} was written anew" for name, old in search.known.items() if not kept(search.run / name, old)]
    expected = dict(search.expected)
    if search.hanging:
        wrong += [] if gone(search.hanging) else ["the stopped worker outlived the search"]
        late = [one for one in search.evaluations() if "longer than the timeout" in str(one.error)]
        if not late and search.starts == 1:
            raise Missed("the worker hung between two pieces of work")
        expected |= {score_of(one): None for one in late}
    return [*search.wrong, *wrong, *repeated(search.run), *differences(expected, outcome(search.run))]


def kept(path: Path, old: bytes) -> bool:
    """Whether a file still has what it had, and maybe more behind it."""
    return path.exists() and path.read_bytes().startswith(old)


def repeated(run: Path) -> list[str]:
    """Candidates that were evaluated twice; what a system failure ended is no evaluation."""
    lines = [line for path in run.rglob("evaluations.jsonl") for line in path.read_text().splitlines()]
    records = [record for record in map(json.loads, lines) if not record["system_failure"]]
    keys = Counter((record["candidate"]["level"], record["candidate"]["index"]) for record in records)
    return [f"level {level}: candidate {index} evaluated {n} times" for (level, index), n in keys.items() if n > 1]


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; it has afterwards."""
    with suppress(psutil.TimeoutExpired):
        process.wait(STOPPING)
        return True
    process.kill()
    return False


# --- faults -----------------------------------------------------------------------------------------------------------


def worker_killed(search: Search, dice: Random) -> str:
    """During whatever runs."""
    victim = dice.choice(search.until(lambda: at_work(search.cluster.workers())))
    victim.kill()
    return f"killed worker {victim.pid}"


def worker_killed_repeatedly(search: Search, dice: Random) -> str:
    """Every new one, as often as is forgiven."""
    hit: set[psutil.Process] = set()
    with suppress(Missed):
        while len(hit) < RETRIES:
            victim = dice.choice(search.until(lambda: [one for one in search.cluster.workers() if one not in hit]))
            time.sleep(dice.random())
            victim.kill()
            hit.add(victim)
    if len(hit) < 2:
        raise Missed("there was no second worker to kill")
    return f"killed {len(hit)} workers, one after another"


def node_lost(search: Search, dice: Random) -> str:
    """One on which the driver does not hang, with work in flight."""
    mine = search.until(lambda: drivers_node(search))
    others = sorted(name for name in search.cluster.raylets() if name != mine)
    dice.shuffle(others)  # the search may have workers on some of them only
    node = search.until(lambda: next((name for name in others if at_work(search.cluster.workers(name))), None))
    search.cluster.raylets()[node].kill()
    return f"killed the raylet of {node}"


def drivers_node_lost(search: Search, dice: Random) -> str:
    """The driver goes with it."""
    node = search.until(lambda: drivers_node(search))
    search.felled = True
    search.cluster.raylets()[node].kill()
    return f"killed the raylet of {node}" + (", the head's" if node == "a" else "")


def drivers_node(search: Search) -> str | None:
    """The node whose object store the driver has mapped."""
    mine = stores(psutil.Process(search.driver.pid))
    return next((name for name, raylet in search.cluster.raylets().items() if mine & stores(raylet)), None)


def stores(process: psutil.Process) -> set[str]:
    """Shared memory that a process has mapped, by its file."""
    return {entry.path for entry in process.memory_maps(grouped=False) if "/plasma" in entry.path}


def node_joins(search: Search, dice: Random) -> str:
    """And gets work, of which some is left: the others rest until it is there."""
    search.until(search.evaluations)  # before the first one a single fine-tuning runs, which needs no other worker
    resting = search.until(lambda: search.cluster.workers())
    try:
        for worker in resting:
            worker.suspend()
        node, started = search.cluster.join(), time.monotonic()
        search.until(lambda: search.cluster.workers(node))
    finally:
        for worker in resting:
            with suppress(psutil.NoSuchProcess):
                worker.resume()
    pids: set[int] = set()

    def served() -> bool:
        pids.update(worker.pid for worker in search.cluster.workers(node))
        return any(worker_of(evaluation) in pids for evaluation in search.evaluations())

    search.until(served)
    return f"{node} joined, and had evaluated a candidate {time.monotonic() - started:.1f} s later"


def worker_of(evaluation: Evaluation) -> int:
    """The process id of who evaluated a candidate; 0 when nobody did."""
    found = re.search(r"/(\d+) ", evaluation.worker)
    return int(found[1]) if found else 0


def candidate_hangs(search: Search, dice: Random) -> str:
    """One that would not have won: magnitude mask and winner of the level are in the journal."""
    level = search.until(lambda: only_losers_left(search))
    victim = dice.choice(search.until(lambda: at_work(search.cluster.workers())))
    if only_losers_left(search) != level:
        raise Missed("the level's candidates were done")
    victim.suspend()
    search.hanging = victim
    return f"stopped worker {victim.pid} in level {level}"


def only_losers_left(search: Search) -> int | None:
    """A level of which candidates are open, but neither the magnitude mask nor the winner to be."""
    names: dict[int, set[str]] = {}
    for evaluation in search.evaluations():
        names.setdefault(evaluation.candidate.level, set()).add(evaluation.candidate.name)
    for level, known in names.items():
        if {"magnitude mask", search.expected[f"level {level} winner"]} <= known and len(known) < POOL:
            return level
    return None


def driver_killed(search: Search, dice: Random) -> str:
    search.fell(signal.SIGKILL)
    return "kill -9"


def driver_stopped(search: Search, dice: Random) -> str:
    """As Ray's Jobs API does it."""
    started = time.monotonic()
    search.fell(signal.SIGTERM)
    if search.driver.returncode == -signal.SIGKILL:
        return f"SIGTERM, and kill -9 as it still ran {STOPPING:.0f} s later"
    return f"SIGTERM; it ended {time.monotonic() - started:.1f} s later"


def journal_torn(search: Search, dice: Random) -> str:
    """The driver dies while it writes a line."""
    search.until(lambda: open_journals(search))
    search.fell(signal.SIGKILL)
    journals = open_journals(search)
    if not journals:
        raise Missed("the level was done in between")
    data = journals[0].read_bytes()
    start = data.rfind(b"\n", 0, -1) + 1
    journals[0].write_bytes(data[: dice.randrange(start + 1, len(data) - 1)])
    return f"kill -9, then cut {journals[0].relative_to(search.run)} in its last line"


def open_journals(search: Search) -> list[Path]:
    """Journals with lines of levels that are not done."""
    found = search.run.glob("level-*/evaluations.jsonl")
    return [path for path in found if path.stat().st_size and not path.with_name("level.json").exists()]


def checkpoint_truncated(search: Search, dice: Random) -> str:
    path = a_finished_file(search, dice)
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))])
    return f"kill -9, then truncated {path.relative_to(search.run)}"


def checkpoint_flipped(search: Search, dice: Random) -> str:
    path = a_finished_file(search, dice)
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)
    return f"kill -9, then flipped a bit of {path.relative_to(search.run)}"


def a_finished_file(search: Search, dice: Random) -> Path:
    """A file of a level done lately, from which the next start is likely to go on, when the driver is dead."""
    search.until(lambda: list(search.run.rglob("level.json")))
    search.fell(signal.SIGKILL)
    record = dice.choice(sorted(search.run.rglob("level.json"), key=lambda path: path.stat().st_mtime)[-2:])
    search.damaged = dice.choice([record, *sorted(record.parent.glob("*.safetensors"))])
    return search.damaged


def second_driver(search: Search, dice: Random) -> str:
    """Must be refused, and the first one must not mind."""
    rival = search.launch("second")
    try:
        search.until(lambda: rival.poll() is not None)
    finally:
        rival.kill()
        rival.wait()
    said = search.said("second")
    if rival.returncode != 2 or "another raymask is working in it" not in said:
        search.wrong.append(f"the second driver ended with exit code {rival.returncode}: {said}")
    return "started a second driver and saw it refused"


@dataclass(frozen=True)
class Fault:
    """What happens, and between which shares of the undisturbed search's lines."""

    happens: Callable[[Search, Random], str]
    first: float = 0.0
    last: float = 0.9

    def moment(self, dice: Random, attempt: int, lines: int) -> tuple[int, float]:
        """After how many lines and seconds more; the earlier, the more often it came too late."""
        share = self.first + (self.last - self.first) * dice.random() / 2**attempt
        return round(share * lines), round(dice.random(), 2)


FAULTS = {
    "worker killed": Fault(worker_killed, 0.1),
    "worker killed repeatedly": Fault(worker_killed_repeatedly, 0.1, 0.7),
    "node lost": Fault(node_lost, 0.1),
    "driver's node lost": Fault(drivers_node_lost, 0.1),
    "node joins": Fault(node_joins, 0.0, 0.2),
    "candidate hangs": Fault(candidate_hangs, 0.1, 0.7),
    "driver killed": Fault(driver_killed),
    "driver stopped": Fault(driver_stopped),
    "journal torn": Fault(journal_torn, 0.2),
    "checkpoint truncated": Fault(checkpoint_truncated, 0.2),
    "checkpoint flipped": Fault(checkpoint_flipped, 0.2),
    "second driver": Fault(second_driver, 0.15, 0.5),  # from when the first one holds the directory
}


def schedule(seed: int) -> Iterator[str]:
    """Every fault once before any comes again, in an order drawn from the seed, without an end."""
    dice = Random(seed)
    while True:
        yield from dice.sample(list(FAULTS), len(FAULTS))


def enough(rounds: int, seconds: float, most: int | None, minutes: float | None) -> bool:
    """Whether no other round is to begin, after so many that ended so long after the start.

    Of two limits whichever comes first; without any, every fault comes once. One round is always played.
    """
    if most is None and minutes is None:
        most = len(FAULTS)
    return rounds > 0 and ((most is not None and rounds >= most) or (minutes is not None and seconds >= 60 * minutes))


# --- rounds -----------------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """What a round did and how it ended; `extra` is against the undisturbed search on the cluster."""

    number: int
    fault: str
    survived: bool = False
    missed: int = 0
    when: str = ""
    did: str = ""
    ends: list[int] = field(default_factory=list)
    seconds: float = 0.0
    extra: float = 0.0
    wrong: list[str] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        if not (self.did or self.wrong):
            return f"round {self.number}, {self.fault}: missed {self.missed} times"
        end = "survived" if self.survived else "FAILED: " + "; ".join(self.wrong)
        codes = f"exit codes {', '.join(map(str, self.ends))}"
        return (
            f"round {self.number}, {self.fault}, {self.when}: {self.did}; {codes}; "
            f"{self.seconds:.1f} s ({self.extra:+.1f}): {end}"
        )

    @property
    def restarts(self) -> int:
        return max(0, len(self.ends) - 1)


@dataclass(frozen=True)
class Chaos:
    """What all rounds share: what must come out, and how the undisturbed search went on the cluster."""

    cluster: Cluster
    folder: Path
    seed: int
    expected: dict[str, Any]
    lines: int
    seconds: float
    timeout: float

    def play(self, number: int, fault: str, say: Callable[[str], None]) -> Round:
        """One round: until the fault hits, as often as is worth it."""
        played = Round(number, fault)
        for attempt in range(ATTEMPTS):
            self.cluster.heal()
            try:
                return self.attempt(played, Random(f"{self.seed} {number} {attempt}"))
            except (Missed, psutil.NoSuchProcess) as missed:
                played.missed += 1
                say(f"round {number}, {fault}, {played.when}: missed: {missed}")
        played.did = ""
        return played

    def attempt(self, played: Round, dice: Random) -> Round:
        """One search with its fault. Raises Missed when that came too late."""
        folder = self.folder / f"round-{played.number}-{played.missed}"
        settings = ["--set", f"workers.timeout={self.timeout:.1f}"] if played.fault == "candidate hangs" else []
        fault = FAULTS[played.fault]
        lines, pause = fault.moment(dice, played.missed, self.lines)
        played.when = f"after line {lines} + {pause:.2f} s"
        started = time.monotonic()
        search = Search(folder, self.cluster, self.expected, *settings)
        try:
            search.until(lambda: len(search.lines()) >= lines)
            time.sleep(pause)
            played.did = fault.happens(search, dice)
            search.known = search.finished()
            played.wrong = search.see_through() or judge(search)
        except RuntimeError as error:
            played.wrong = [str(error)]
        finally:
            search.close()
        played.survived = not played.wrong
        played.ends, played.seconds = search.ends, time.monotonic() - started
        played.extra, played.outcome = played.seconds - self.seconds, outcome(search.run)
        if played.survived:
            shutil.rmtree(folder)
        return played


def undisturbed(folder: Path, meanwhile: Callable[[], None]) -> dict[str, Any]:
    """What one process finds, without Ray; something else may be done until it has."""
    folder.mkdir(parents=True)
    words = [*command(folder), "--in-process"]
    with (folder / "out").open("w") as out:
        search = subprocess.Popen(words, cwd=folder.parent, env=environ(), stdout=out, stderr=out)
    try:
        meanwhile()
        code = search.wait(PATIENCE)
    finally:
        search.kill()
        search.wait()
    if code:
        raise RuntimeError(f"the undisturbed search failed:\n{(folder / 'out').read_text(errors='replace')}")
    return outcome(folder / "run")


def prepare(cluster: Cluster, folder: Path, seed: int, expected: dict[str, Any]) -> Chaos:
    """The undisturbed search on the cluster, which must find the same."""
    started = time.monotonic()
    search = Search(folder / "undisturbed", cluster, expected)
    try:
        if wrong := search.see_through() or judge(search):
            raise RuntimeError(f"the undisturbed search on Ray failed: {'; '.join(wrong)}; see {search.folder}")
    finally:
        search.close()
    slowest = max(evaluation.seconds for evaluation in search.evaluations())
    seconds = time.monotonic() - started
    return Chaos(cluster, folder, seed, expected, len(search.lines()), seconds, max(6.0, 8 * slowest))


def table(rounds: Sequence[Round]) -> Table:
    """A row a fault, and their sum."""
    found = Table()
    for head in ("fault", "rounds", "survived", "missed", "restarts", "extra seconds"):
        found.add_column(head, justify="left" if head == "fault" else "right")
    for name in (*FAULTS, "all"):
        rows = [played for played in rounds if name in (played.fault, "all")]
        hit = [played for played in rows if played.did]
        extra = f"{sum(played.extra for played in hit) / len(hit):+.1f}" if hit else ""
        survived, missed = sum(played.survived for played in rows), sum(played.missed for played in rows)
        restarts = sum(played.restarts for played in rows)
        if rows:
            found.add_row(name, *map(str, (len(rows), survived, missed, restarts)), extra, end_section=name == "all")
    return found


def main(
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How many faults, one a round; all once by default.", show_default=False)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="After how many minutes no other round begins.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the faults' order and moments.")] = 0,
    workdir: Annotated[
        Path | None, typer.Option(help="Where failed rounds stay; a temporary folder by default.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", help="A file for the outcome of every round.")] = None,
) -> None:
    """Prove that a search survives: one fault a round, and the undisturbed search's outcome after each."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console, started = Console(width=None if sys.stdout.isatty() else 120), time.monotonic()
    if workdir:
        workdir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=workdir and workdir.resolve()))
    cluster, played = Cluster(), list[Round]()

    def say(text: str) -> None:
        console.print(Text(f"[{time.monotonic() - started:6.0f} s] {text}"), soft_wrap=True)
        console.file.flush()  # a file or a pipe shows each line when it is said

    try:
        write_task(folder)
        expected = undisturbed(folder / "in-process", cluster.up)
        chaos = prepare(cluster, folder, seed, expected)
        say(f"undisturbed: {chaos.seconds:.1f} s, {chaos.lines} lines, mask {expected[f'level {LEVELS} mask']}")
        for number, fault in enumerate(schedule(seed), 1):
            if enough(len(played), time.monotonic() - started, rounds, minutes):
                break
            played.append(chaos.play(number, fault, say))
            say(played[-1].line())
    finally:
        cluster.down()
        shutil.rmtree(cluster.home, ignore_errors=True)
    console.print(table(played))
    if report:
        whole = {"seed": seed, "undisturbed": expected, "seconds": chaos.seconds, "rounds": list(map(asdict, played))}
        report.write_text(json.dumps(whole, indent=1) + "\n")
    if all(one.survived for one in played):
        shutil.rmtree(folder)
        return
    say(f"the rounds that failed are in {folder}")
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
