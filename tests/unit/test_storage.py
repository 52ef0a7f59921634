"""Is a run the same in a folder and in an object store, and safe in both, whatever happens to drivers and disks?"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs
from rich.console import Console
from support.builders import refused, reviews, tiny_model, write_table
from support.records import checkpoint, evaluation, write
from support.s3_server import ACCESS_DENIED, BUCKET, S3Server, s3_server

from raymask import storage
from raymask.cli import spec_path
from raymask.config import load_spec, make_spec
from raymask.core.errors import UserError
from raymask.core.records import Level, Result
from raymask.core.tensors import pack
from raymask.driver.search import search
from raymask.report.show import show_run
from raymask.report.terminal import Silent
from raymask.storage import Bucket, Folder, Storage, open_storage
from raymask.store import DENSE, IMP, MASK, MODEL, SEARCH, RunDir, check_run, level_name, open_run, write_tensors

HOLDS = ("lock", "claims", "beats")  # what a driver holds a place by
GO_ON = "Mend that and the same command goes on from here, or choose another place with"


@dataclass(frozen=True)
class Place:
    """Where a run lies, and its files as they are there, read past raymask."""

    uri: str
    filesystem: Any
    root: str

    def open(self, note: Callable[[str], None] = lambda text: None) -> Storage:
        return open_storage(self.uri, note)

    def files(self) -> dict[str, bytes]:
        """All files by name, a driver's hold apart."""
        selector = fs.FileSelector(self.root, allow_not_found=True, recursive=True)
        found = [info.path for info in self.filesystem.get_file_info(selector) if info.is_file]
        names = sorted(path.removeprefix(f"{self.root}/") for path in found)
        return {name: self.read(name) for name in names if name.split("/")[0] not in HOLDS}

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.root}/{name}") as stream:
            stream.write(data)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path) -> Place:
    """A place of this test's own on the S3 server."""
    return Place(s3.uri(tmp_path.name), s3.filesystem(), f"{BUCKET}/{tmp_path.name}")


@pytest.fixture
def memory(tmp_path: Path) -> Place:
    """A place of this test's own in fsspec's memory."""
    root = f"/{tmp_path.name}"
    return Place(f"memory:/{root}", fs.PyFileSystem(fs.FSSpecHandler(MemoryFileSystem())), root)


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "run"), fs.LocalFileSystem(), str(tmp_path / "run"))


@pytest.fixture(params=["folder", "memory", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drivers' protocol with other numbers: it still takes several missing beats to be held for dead."""
    monkeypatch.setattr(storage, "BEAT", 0.2)
    monkeypatch.setattr(storage, "LOOKS", 3)


# --- both storages do the same ---------------------------------------------------------------------------------------


def test_a_place_that_does_not_exist_is_empty(place: Place) -> None:
    there = place.open()
    assert list(there.names()) == []
    assert not there.has("a")
    assert not there.busy()
    with pytest.raises(FileNotFoundError):
        there.read("a/b")
    with pytest.raises(FileNotFoundError), there.reading("a/b") as path:
        path.read_bytes()
    assert place.files() == {}


def test_what_is_written_is_there_under_its_name_and_replaced_whole(place: Place) -> None:
    there = place.open()
    for data in (b"a longer one", b"short", b""):
        with there.writing("level-1/a.bin") as path:
            path.write_bytes(data)
        assert there.has("level-1/a.bin")
        assert there.read("level-1/a.bin") == data
        with there.reading("level-1/a.bin") as path:
            assert path.read_bytes() == data
        assert place.files() == {"level-1/a.bin": data}
    assert list(there.names()) == ["level-1/a.bin"]
    assert not there.has("level-1")


def test_who_reads_while_a_file_is_replaced_reads_the_old_one_to_its_end(folder: Place) -> None:
    there = folder.open()
    with there.writing("file") as path:
        path.write_text("old")
    with there.reading("file") as place, place.open() as reader:
        with there.writing("file") as path:
            path.write_text("new")
        assert reader.read() == "old"
    assert there.read("file") == b"new"


def test_more_than_one_part_of_an_upload_comes_back(place: Place) -> None:
    data = random.Random(0).randbytes(23 * 2**20)
    with place.open().writing("model") as path:
        path.write_bytes(data)
    with place.open().reading("model") as path:
        assert path.read_bytes() == data


def test_nothing_is_left_of_a_folder_that_was_there_before(place: Place) -> None:
    there = place.open()
    for name in ("old", "new"):
        with there.writing_folder("export") as path:
            (path / name).write_bytes(b"1")
    assert place.files() == {"export/new": b"1"}


def test_a_folder_appears_with_all_its_files(place: Place) -> None:
    there, before = place.open(), list[str]()
    for data in (b"1", b"2"):
        with there.writing_folder("export") as path:
            (path / "inner").mkdir()
            (path / "config.json").write_bytes(data)
            (path / "inner" / "x").write_bytes(data)
            assert sorted(there.names()) == before
        assert place.files() == {"export/config.json": data, "export/inner/x": data}
        before = ["export/config.json", "export/inner/x"]
    assert sorted(there.names()) == before


@pytest.mark.parametrize("before", [b"old", None])
def test_nothing_is_visible_of_a_block_that_raises(place: Place, before: bytes | None) -> None:
    there = place.open()
    expected = {} if before is None else {"a/file": before, "export/x": before}
    for name, data in expected.items():
        with there.writing(name) as path:
            path.write_bytes(data)
    with pytest.raises(ZeroDivisionError), there.writing("a/file") as path:
        path.write_bytes(b"new")
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), there.writing_folder("export") as path:
        (path / "x").write_bytes(b"new")
        _ = 1 / 0
    assert place.files() == expected
    assert sorted(there.names()) == sorted(expected)


def test_what_a_killed_driver_left_half_written_counts_for_nothing(folder: Place) -> None:
    there = Path(folder.uri)
    for name in ("level-1/model.safetensors.part", "export.part/config.json"):
        (there / name).parent.mkdir(parents=True)
        (there / name).write_text("half")
    assert list(folder.open().names()) == []
    with folder.open().writing_folder("export") as path:
        (path / "x").write_text("whole")
    assert "export.part/config.json" not in folder.files()


@pytest.mark.parametrize("torn", [b"", b"half a li"])
def test_a_line_is_added_after_whatever_is_whole(place: Place, torn: bytes) -> None:
    there = place.open()
    there.append("level-1/journal", b"one")
    there.append("level-1/journal", b"two")
    assert place.read("level-1/journal") == b"one\ntwo\n"
    place.write("level-1/journal", b"one\ntwo\n" + torn)
    there.append("level-1/journal", b"three")
    assert place.read("level-1/journal") == b"one\ntwo\nthree\n"


def test_ctrl_c_at_any_moment_leaves_what_was_there_or_what_was_to_be(place: Place) -> None:
    """At as many moments from the beginning of a write to its end."""
    there = place.open()
    started = time.monotonic()
    there.append("journal", b"0" * 2**20)
    usual = time.monotonic() - started
    me, line = threading.get_ident(), b"0" * 2**20
    expected = line + b"\n"
    for step in range(20):
        timer = threading.Timer(usual * step / 15, signal.pthread_kill, (me, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            there.append("journal", line)
            expected += line + b"\n"
            while True:  # not one long sleep, which a signal just before it would not end
                time.sleep(0.01)
        now = place.read("journal")
        assert now.startswith(expected), f"interrupted after {step / 15:.0%} of a write"
        expected = storage.whole_lines(now)


# --- a run directory -------------------------------------------------------------------------------------------------


def fill(store: RunDir) -> None:
    """A run of one level, as a search would leave it."""
    with open_run(store, make_spec({"model": "quickstart", "task": "quickstart"})):
        write(store, DENSE, 0)
        for index in range(3):
            store.append(evaluation(index))
        for lineage in (SEARCH, IMP):
            write(store, lineage, 1)


def test_a_run_is_laid_out_byte_for_byte_as_in_a_folder(place: Place, tmp_path: Path) -> None:
    """So that a run can be copied from one storage to another and gone on with."""
    fill(RunDir(place.uri))
    fill(RunDir(tmp_path / "reference"))
    local = Place("", fs.LocalFileSystem(), str(tmp_path / "reference"))
    assert place.files() == local.files()
    assert sorted(RunDir(place.uri).storage.names()) == sorted(local.files())
    assert "level-1/evaluations.jsonl" in local.files()
    assert sum(name.endswith("level.json") for name in local.files()) == 3


def test_a_run_is_read_back_from_any_storage(place: Place) -> None:
    fill(RunDir(place.uri))
    store = RunDir(place.uri)
    assert store.evaluations(1) == [evaluation(index) for index in range(3)]
    assert store.has_level(DENSE, 0)
    assert not store.has_level(SEARCH, 2)
    assert store.read_level(SEARCH, 1) == store.read_level(IMP, 1)
    assert np.array_equal(store.read_weights(SEARCH, 1).buffer, checkpoint().weights.buffer)
    assert np.array_equal(store.read_logits(IMP, 1), checkpoint().logits)
    assert store.read_spec() == make_spec({"model": "quickstart", "task": "quickstart"})
    assert store.has_work()
    assert not [name for name in store.results() if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (MODEL, lambda data: data[:-3]),
        (MODEL, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        (MODEL, lambda _: b""),
        (MASK, lambda data: data[:-1] + bytes([data[-1] ^ 64])),
    ],
    ids=["truncated", "flipped", "emptied", "mask flipped"],
)
def test_damaged_tensors_are_refused_by_their_hash(place: Place, name: str, damage: Callable[[bytes], bytes]) -> None:
    store = RunDir(place.uri)
    write(store)
    place.write(f"level-1/{name}", damage(place.read(f"level-1/{name}")))
    said = refused(store.read_tensors, SEARCH, 1, name)
    record = store.level_uri(SEARCH, 1)
    where = f"{store.storage.at(f'level-1/{name}')}: is not what was written there (its hash differs)."
    assert said == f"{where} Delete {record} to do this level again"


def test_a_damaged_record_is_refused_in_any_storage(place: Place) -> None:
    store = RunDir(place.uri)
    write(store)
    store.append(evaluation(0))
    store.append(evaluation(1))
    level, journal = place.read("level-1/level.json"), place.read("level-1/evaluations.jsonl")
    for damaged in (level[:-3], level[:30] + bytes([level[30] ^ 1]) + level[31:], b""):
        place.write("level-1/level.json", damaged)
        said = refused(store.read_level, SEARCH, 1)
        assert said == f"{store.level_uri(SEARCH, 1)}: is damaged. Delete it to do this level again"
    for cut in (1, 20, len(journal) // 2 - 1):
        place.write("level-1/evaluations.jsonl", journal[:-cut])
        assert store.evaluations(1) == [evaluation(0)]
    place.write("level-1/evaluations.jsonl", journal[:9] + b"#" + journal[10:])
    where = store.storage.at("level-1/evaluations.jsonl")
    said = refused(store.evaluations, 1)
    assert said == f"{where}: line 1 is damaged. Delete the file to evaluate this level again"


def test_a_level_of_which_an_object_is_missing_says_so(place: Place) -> None:
    store = RunDir(place.uri)
    write(store)
    place.filesystem.delete_file(f"{place.root}/level-1/{MODEL}")
    assert "model.safetensors: is gone. Delete " in refused(store.read_weights, SEARCH, 1)


def test_a_file_that_cannot_be_read_just_now_is_no_reason_to_delete_anything(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunDir(folder.uri)
    write(store)

    def stale(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")  # as NFS says when its server comes back

    for reader, read in ((Path, store.read_level), (hashlib, store.read_weights)):
        with monkeypatch.context() as patch:
            patch.setattr(reader, "read_bytes" if reader is Path else "file_digest", stale)
            said = refused(read, SEARCH, 1)
        assert "cannot be read: Stale file handle. Mend that and the same command goes on from here" in said
        assert "Delete" not in said


def test_a_name_that_would_lead_out_of_a_folder_counts_for_nothing(memory: Place) -> None:
    """Whoever can write to a bucket must not write to the machine of whoever fetches from it."""
    for name in ("../../evil.txt", "/absolute", "export/../../evil"):
        with memory.filesystem.open_output_stream(f"{memory.root}/{name}") as stream:
            stream.write(b"x")
    memory.write("result.json", b"{}")
    assert list(memory.open().names()) == ["result.json"]
    assert not any(map(storage.counts, ("../x", "/x", "a//b", "a/../../x", ".", "./x")))


# --- one driver at a time --------------------------------------------------------------------------------------------

DRIVER = """
import sys
from raymask import storage
from raymask.core.errors import UserError
storage.BEAT, storage.LOOKS = 0.2, 3
place = storage.open_storage(sys.argv[1])
try:
    with place.held():
        print("held", flush=True)
        for line in sys.stdin:
            place.append("journal", line.strip().encode())
            print("written", flush=True)
except UserError as error:
    print(error, flush=True)
"""


@dataclass
class Driver:
    """A process that holds a place, and writes a line into its journal when told to."""

    process: subprocess.Popen[str]

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def writes(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.says()


@contextmanager
def driver(place: Place) -> Iterator[Driver]:
    command = [sys.executable, "-c", DRIVER, place.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Driver(process)
        finally:
            process.kill()


@pytest.fixture(params=["folder", "bucket"])
def shared(request: pytest.FixtureRequest) -> Place:
    """A place that other processes reach too."""
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.mark.usefixtures("quick")
def test_a_second_driver_is_refused_while_the_first_lives_and_free_to_go_on_when_it_ended(shared: Place) -> None:
    with driver(shared) as first:
        assert first.says() == "held"
        assert first.writes("one") == "written"
        assert shared.open().busy()
        assert list(shared.open().names()) == ["journal"]
        said = refused(check_run, RunDir(shared.uri), make_spec({"model": "quickstart", "task": "quickstart"}))
        where = shared.open().at()
        assert said == f"{where}: is not empty and not a run directory: choose another with --run"
        shared.write("spec.yaml", b"")
        said = refused(check_run, RunDir(shared.uri), make_spec({"model": "quickstart", "task": "quickstart"}))
        assert said == f"{where}: another raymask is working in it; wait for it, or choose another with --run"
        said = refused(shared.open().held().__enter__)
        assert said.startswith(f"{where}: another raymask ")
        assert "wait for it" in said
        assert first.writes("two") == "written"
        assert first.process.stdin is not None
        first.process.stdin.close()
        first.process.wait(30)
    began = time.monotonic()
    assert not shared.open().busy()
    with shared.open().held():
        shared.open().append("journal", b"three")
    assert time.monotonic() - began < storage.LOOKS - 1, "a hold that was given back need not be watched"
    assert shared.read("journal") == b"one\ntwo\nthree\n"


@pytest.mark.usefixtures("quick")
def test_the_hold_of_a_killed_driver_does_not_block_for_ever(shared: Place) -> None:
    with driver(shared) as first:
        assert first.says() == "held"
        first.process.kill()
    told: list[str] = []
    there = shared.open(told.append)
    assert not there.busy()
    seen = len(told)
    with there.held():
        assert shared.open().busy()
        there.append("journal", b"mine")
    if isinstance(there, Bucket):
        assert told == [f"{there.at()} is held by another driver: looking for 3 s whether it is alive"]
        assert len(told) == seen, "it was held for dead already, and has given no sign of life since"
    began = time.monotonic()
    assert not shared.open().busy()
    assert time.monotonic() - began < storage.LOOKS - 1, "the dead driver's hold is gone"


@pytest.mark.usefixtures("quick")
def test_a_driver_that_was_held_for_dead_writes_no_more_and_says_so(bucket: Place) -> None:
    """A machine that sleeps, or loses the network for a while, and finds another driver in its place."""
    with driver(bucket) as first:
        assert first.says() == "held"
        assert first.writes("one") == "written"
        first.process.send_signal(signal.SIGSTOP)
        there = bucket.open()
        with there.held():
            there.append("journal", b"two")
            first.process.send_signal(signal.SIGCONT)
            base = bucket.uri.partition("?")[0]
            said = f"{base}: another raymask has taken it over, since this one gave no sign of life"
            assert first.writes("never") == said
            time.sleep(3 * storage.BEAT)
            there.append("journal", b"three")
    assert bucket.read("journal") == b"one\ntwo\nthree\n"


def test_a_driver_that_wakes_up_after_it_was_held_for_dead_is_looked_at_again(
    memory: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look before anything is read, and the one before anything is written, minutes may pass."""
    monkeypatch.setattr(storage, "LOOKS", 2)
    there, ended = memory.open(), threading.Event()
    with there.writing("claims/sleeper") as path:
        path.touch()
    with there.writing("beats/sleeper") as path:
        path.write_text("7")
    assert not there.busy()

    def wake() -> None:
        count = 7
        while not ended.wait(0.1):
            memory.write("beats/sleeper", str(count := count + 1).encode())

    awake = threading.Thread(target=wake)
    awake.start()
    try:
        time.sleep(0.3)
        assert "another raymask is working in it" in refused(there.held().__enter__)
    finally:
        ended.set()
        awake.join()
    with there.held():
        assert not memory.open().has("claims/sleeper")


def test_a_driver_that_ends_while_it_is_looked_at_is_not_waited_for(
    memory: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "BEAT", 1.0)
    began = time.monotonic()
    with ExitStack() as first:
        first.enter_context(memory.open().held())
        ended = threading.Timer(0.5, first.close)
        ended.start()
        assert not memory.open().busy()
        ended.join()
    assert time.monotonic() - began < storage.LOOKS / 2


def test_a_sign_of_life_that_comes_late_does_not_bring_a_claim_back(memory: Place) -> None:
    first, second = memory.open(), memory.open()
    assert isinstance(first, Bucket)
    assert isinstance(second, Bucket)
    with first.held():
        second.remove(first.mine.rpartition("/")[2])
        memory.write(first.mine.replace("claims", "beats"), b"99")
        assert "another raymask has taken it over" in refused(first.append, "journal", b"x")
        assert not second.busy()
    assert memory.files() == {}


@pytest.mark.faults
@pytest.mark.long
def test_during_an_outage_nobody_is_held_for_dead(bucket: Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the outage is longer than a driver may be without a sign of life."""
    monkeypatch.setattr(storage, "BEAT", 0.2)
    monkeypatch.setattr(storage, "LOOKS", 8)  # Amazon's client sleeps for seconds between its own attempts
    told: list[str] = []

    def note(text: str) -> None:
        told.append(text)
        if len(told) == 1:  # we are about to look
            outage.enter_context(s3.outage())

    with driver(bucket) as first, ExitStack() as outage:
        assert first.says() == "held"
        threading.Timer(12.0, outage.close).start()
        assert "another raymask is working in it" in refused(bucket.open(note).held().__enter__)
        assert any("answers with an error, trying again" in text for text in told)
        assert first.writes("one") == "written"


class World:
    """A time of its own for threads, of which one runs at a time: the one whose turn comes first."""

    def __init__(self, seed: int, slowest: float) -> None:
        self.now = 0.0
        self.turn = threading.Condition()
        self.running = 0
        self.wakes: dict[Any, float] = {}
        self.random, self.slowest = random.Random(seed), slowest

    def sleep(self, seconds: float) -> None:
        me = threading.current_thread()
        with self.turn:
            self.wakes[me] = self.now + seconds
            self.running -= 1
            self.wait_for_turn(me)

    def wait_for_turn(self, me: Any) -> None:
        self.turn.notify_all()
        self.turn.wait_for(lambda: not self.running and min(self.wakes, key=self.wakes.__getitem__) is me)
        self.running += 1
        self.now = self.wakes.pop(me)

    def thread(self, target: Callable[..., None], args: tuple[Any, ...] = (), daemon: bool = True) -> Any:
        """A thread that starts now, in this world's time, and can be waited for in it."""

        def run() -> None:
            with self.turn:
                self.wait_for_turn(thread)
            try:
                target(*args)
            finally:
                with self.turn:
                    self.running -= 1
                    done.append(True)
                    self.turn.notify_all()

        def start() -> None:
            self.wakes[thread] = self.now
            thread.start()

        def join() -> None:
            while not done:
                self.sleep(0.1)

        done: list[bool] = []
        thread = threading.Thread(target=run, daemon=daemon)
        return SimpleNamespace(start=start, join=join)

    def event(self) -> Any:
        """What ends a pulse; it is noticed at the next beat."""
        ended: list[bool] = []

        def wait(seconds: float) -> bool:
            self.sleep(seconds)
            return bool(ended)

        return SimpleNamespace(set=lambda: ended.append(True), wait=wait)


class Slow:
    """A file system every answer of which takes a while."""

    def __init__(self, world: World, inner: Any) -> None:
        self.world, self.inner = world, inner
        self.type_name = inner.type_name

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.world.sleep(self.world.random.uniform(0, self.world.slowest))
            return getattr(self.inner, name)(*arguments, **options)

        return call


class SlowBucket(Bucket):
    def send(self, name: str, path: Path) -> None:
        with self.filesystem.open_output_stream(f"{self.root}/{name}") as stream:
            stream.write(path.read_bytes())


@pytest.mark.faults
@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    starts=st.lists(st.sampled_from([0.0, 0.0, 1.0, 5.0, 14.0, 16.0, 30.0]), min_size=2, max_size=4),
    stays=st.sampled_from([0.0, 10.0, 60.0]),
    dead=st.booleans(),
    slowest=st.sampled_from([0.0, 0.2, 3.0]),
)
def test_of_drivers_that_come_at_any_time_one_at_most_is_in(
    seed: int, starts: list[float], stays: float, dead: bool, slowest: float
) -> None:
    """The protocol itself, its own numbers and all, on a storage that takes up to 3 s for each answer."""
    root = f"/world-{seed}-{len(starts)}"
    with suppress(FileNotFoundError):
        MemoryFileSystem().rm(root, recursive=True)
    inner = fs.PyFileSystem(fs.FSSpecHandler(MemoryFileSystem()))
    for folder in ("claims", "beats"):
        inner.create_dir(f"{root}/{folder}", recursive=True)
        if dead:
            Place("", inner, root).write(f"{folder}/long-ago", b"7")
    world = World(seed, slowest)
    inside: list[int] = []
    entered: list[int] = []
    refusals: list[str] = []
    crowds: list[list[int]] = []

    def drive(number: int, start: float) -> None:
        world.sleep(start)
        there = SlowBucket("memory://", Slow(world, inner), root, lambda text: None)
        try:
            with there.held():
                inside.append(number)
                entered.append(number)
                crowds.append(list(inside))
                world.sleep(stays)
                there.append("journal", str(number).encode())
                inside.remove(number)
        except UserError as error:
            refusals.append(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "time", SimpleNamespace(sleep=world.sleep, monotonic=lambda: world.now))
        patch.setattr(storage, "threading", SimpleNamespace(Thread=world.thread, Event=world.event))
        world.running = 1  # this thread
        drivers = [world.thread(drive, args) for args in enumerate(starts)]
        for one in drivers:
            one.start()
        for one in drivers:
            one.join()
    assert all(len(crowd) == 1 for crowd in crowds)
    assert len(entered) + len(refusals) == len(starts)
    assert all("another raymask is working in it; wait for it" in said for said in refusals)
    if len(set(starts)) == len(starts) and sorted(starts)[1] - min(starts) >= 14 and slowest < 1:
        assert starts.index(min(starts)) in entered, "who comes first and alone is never refused"
    written = Place("", inner, root).files().get("journal", b"").split()
    assert written == [str(number).encode() for number in entered]


def no_locks(file: Any, kind: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_is_refused(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder.open().held():
        pass
    monkeypatch.setattr(fcntl, "flock", no_locks)
    expected = (
        f"{folder.uri}: its file system has no locks (No locks available), so that two drivers could work in it at "
        "once: choose another with --run"
    )
    assert refused(folder.open().held().__enter__) == expected
    assert refused(folder.open().busy) == expected


def test_on_nfs_a_hold_is_seen_without_the_right_to_write(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS gives an exclusive lock only to those who opened the file for writing (flock(2))."""
    flock = fcntl.flock

    def like_nfs(file: Any, kind: int) -> None:
        if kind & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", like_nfs)
    with folder.open().held():
        assert folder.open().busy()
    assert not folder.open().busy()


def test_two_that_look_do_not_see_a_driver_in_each_other(folder: Place) -> None:
    with folder.open().held():
        pass
    with Path(folder.uri, "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not folder.open().busy()


def test_a_driver_is_not_refused_for_one_who_only_looks(folder: Place) -> None:
    with folder.open().held():
        pass
    with Path(folder.uri, "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        with folder.open().held():
            pass


def test_who_loses_the_race_for_a_folder_is_told(folder: Place) -> None:
    with folder.open().held():
        said = refused(folder.open().held().__enter__)
    assert said == f"{folder.uri}: another raymask has just started in it; wait for it"


# --- a storage that answers with errors ------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.long
def test_a_line_and_a_level_survive_an_outage_and_it_is_told(bucket: Place, s3: S3Server) -> None:
    """The outage lasts until it is told, so it is longer than what Amazon's client sits out by itself."""
    told: list[str] = []
    for work in (lambda store: store.append(evaluation(0)), write):
        with ExitStack() as outage:
            outage.enter_context(s3.outage())
            count = len(told)

            def note(text: str, outage: ExitStack = outage) -> None:
                told.append(text)
                outage.close()

            work(RunDir(bucket.uri, note))
            assert len(told) > count
    where = bucket.uri.partition("?")[0]
    assert all(text.startswith(f"{where} answers with an error, trying again: When ") for text in told)
    store = RunDir(bucket.uri)
    assert store.evaluations(1) == [evaluation(0)]
    assert np.array_equal(store.read_weights(SEARCH, 1).buffer, checkpoint().weights.buffer)


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("done", ["read", "written"])
def test_an_outage_that_does_not_end_is_an_error_that_says_how_to_go_on(
    bucket: Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    monkeypatch.setattr(storage, "OUTAGE", 0.1)
    store = RunDir(bucket.uri)
    store.append(evaluation(0))
    with s3.outage(), pytest.raises(UserError) as raised:
        if done == "read":
            store.evaluations(1)
        else:
            store.write_text("spec.yaml", "x")
    assert str(raised.value).startswith(f"{store.storage.at()}: cannot be {done}: When ")
    assert str(raised.value).endswith(f"{GO_ON} --run")
    store.append(evaluation(1))
    assert store.evaluations(1) == [evaluation(0), evaluation(1)]


@pytest.mark.parametrize(
    "answer",
    [ACCESS_DENIED, "403 InvalidAccessKeyId", "403 SignatureDoesNotMatch", "400 ExpiredToken", "301 PermanentRedirect"],
)
def test_what_no_patience_mends_is_said_at_once(bucket: Place, s3: S3Server, answer: str) -> None:
    told: list[str] = []
    there = bucket.open(told.append)
    with s3.outage(answer):
        for work in (lambda: there.has("a"), lambda: list(there.names()), lambda: there.append("a", b"x"), there.busy):
            assert ": cannot be read: When " in refused(work)
    with there.writing("a") as path, ExitStack() as denied:
        path.write_text("x")
        denied.enter_context(s3.outage(answer))
        assert ": cannot be written: When initiating " in refused(there.put, "a", path)
    assert told == []


def test_a_bucket_that_is_none_is_said_at_once(s3: S3Server) -> None:
    told: list[str] = []
    there = open_storage(s3.uri("run", bucket="missing"), told.append)
    assert not there.has("spec.yaml")
    assert "NO_SUCH_BUCKET" in refused(there.held().__enter__)
    assert told == []


def test_what_is_missing_is_an_answer_to_who_reads_and_an_error_to_who_writes(memory: Place) -> None:
    """So fsspec's storages speak of a bucket that is none."""

    def missing() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "bucket")

    there = memory.open()
    assert isinstance(there, Bucket)
    with pytest.raises(FileNotFoundError):
        there.patiently("read", missing)
    assert "cannot be written: [Errno 2] No such file or directory: 'bucket'. Mend that" in refused(
        there.patiently, "written", missing
    )


def test_a_storage_that_nobody_writes_to_is_said() -> None:
    told: list[str] = []
    there = open_storage("http://127.0.0.1:9/run", told.append)
    assert refused(there.held().__enter__).startswith("http://127.0.0.1:9/run: cannot be written: ")
    assert told == []


def test_google_s_client_is_not_left_to_be_patient_alone() -> None:
    """Without credentials or a network it would try for a quarter of an hour before anything is said."""
    assert storage.bounded("gs://b/run") == "gs://b/run?retry_limit_seconds=5"
    assert storage.bounded("gcs://b/run?scheme=http") == "gcs://b/run?scheme=http&retry_limit_seconds=5"
    for other in ("gs://b/run?retry_limit_seconds=9", "s3://b/run?region=x"):
        assert storage.bounded(other) == other
    assert open_storage("gs://b/run").uri == "gs://b/run"


# --- a disk that is full, or not ours to write -----------------------------------------------------------------------


class Disk:
    """A file system of one MiB."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def fill(self, left: int) -> None:
        """Leave so many bytes free; tmpfs counts pages of 4096."""
        space = os.statvfs(self.path)
        (self.path / "ballast").write_bytes(bytes(space.f_bavail * space.f_frsize - left))

    def empty(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "disk")
    found.path.mkdir()
    if os.geteuid() != 0 or not found.mount("size=1m"):
        pytest.skip("only root may mount a small file system")
    try:
        yield found
    finally:
        subprocess.run(["umount", str(found.path)], check=True)


LARGE = pack({"a": torch.ones(2**19)})  # 2 MiB


def write_large(store: RunDir) -> Level:
    """A level whose model has 2 MiB."""
    with tempfile.TemporaryDirectory() as elsewhere:
        record = write(RunDir(elsewhere))
    return store.write_level(SEARCH, 1, replace(checkpoint(), weights=LARGE), record)


def test_a_level_that_does_not_fit_is_said_and_written_once_there_is_room(disk: Disk) -> None:
    store = RunDir(disk.path / "run")
    said = refused(write_large, store)
    assert said.startswith(f"{disk.path}/run/level-1/model.safetensors: cannot be written: ")
    assert "No space left on device" in said
    assert said.endswith(f"{GO_ON} --run")
    assert list(store.storage.names()) == []
    assert not any(path.is_file() for path in disk.path.rglob("*"))
    assert disk.mount("remount,size=8m")
    write_large(store)
    assert np.array_equal(store.read_weights(SEARCH, 1).buffer, LARGE.buffer)


def test_a_line_that_does_not_fit_is_said_and_the_journal_keeps_what_it_had(disk: Disk) -> None:
    store = RunDir(disk.path / "run")
    store.append(evaluation(0))
    disk.fill(left=8192)
    long = evaluation(1).model_copy(update={"row_losses": bytes(50_000)})
    said = refused(store.append, long)
    where = f"{disk.path}/run/level-1/evaluations.jsonl"
    assert said == f"{where}: cannot be written: No space left on device. {GO_ON} --run"
    assert store.evaluations(1) == [evaluation(0)]
    disk.empty()
    store.append(long)
    assert store.evaluations(1) == [evaluation(0), long]


def test_an_export_that_does_not_fit_leaves_nothing_behind(disk: Disk) -> None:
    there = open_storage(disk.path / "run")
    with pytest.raises(UserError, match=r"export: cannot be written: .*No space left"):  # noqa: SIM117
        with there.writing_folder("export") as path:
            (path / "config.json").write_text("{}")
            write_tensors(path / "model.safetensors", LARGE.views())
    assert list(there.names()) == []
    assert not any(path.is_file() for path in disk.path.rglob("*"))


def test_a_local_disk_on_which_nothing_can_be_prepared_for_a_bucket_is_said(
    disk: Disk, memory: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = RunDir(memory.uri).storage

    def prepare() -> None:
        with there.writing("model") as path:
            path.write_bytes(bytes(2**21))

    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    said = refused(prepare)
    assert said == f"the folder for temporary files: cannot be written: No space left on device. {GO_ON} TMPDIR"
    assert memory.files() == {}
    assert list(disk.path.iterdir()) == []


def test_a_place_that_is_not_ours_to_write_is_said_and_still_read(disk: Disk) -> None:
    there = open_storage(disk.path / "run")
    with there.held():
        there.append("journal", b"line")
    assert disk.mount("remount,ro")

    def file() -> None:
        with there.writing("file") as path:
            path.write_text("x")

    for name, work in (
        ("/file", file),
        ("/export", there.writing_folder("export").__enter__),
        ("/journal", lambda: there.append("journal", b"x")),
        ("", there.held().__enter__),
    ):
        assert refused(work) == f"{there.at()}{name}: cannot be written: Read-only file system. {GO_ON} --run"
    assert there.read("journal") == b"line\n"
    assert not there.busy()


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@bucket/run",
        "s3://AKIA:hun/ter/hunter2@bucket/run?region=us-east-1",
        "s3://AKIA:hunt?hunter2@bucket/run",
        "abfs://container@account.dfs.core.windows.net/run?client_secret=hunter2",
        "abfs://container@account.dfs.core.windows.net/run?tenant_id=1&sig=hunter2",
        "sftp://me:hunter2@host:22/run",
    ],
)
def test_a_password_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    said = refused(open_storage, uri)
    assert ": credentials do not belong in a URI, which is logged: put them where " in said
    assert "hunter2" not in said
    assert "AKIA" not in said


@pytest.mark.parametrize(
    "uri",
    ["memory://x", "s3://bucket/run?region=us-east-1", "gs://anonymous@bucket/run", "hdfs://h:9000/user@x/run"],
)
def test_a_uri_without_one_is_not_taken_for_one_with(uri: str) -> None:
    assert not storage.SECRET.search(uri)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("nosuch://x/y", "cannot be reached: Protocol not known: nosuch"),
        ("s3://bucket/run?regoin=x", "cannot be reached: Unexpected query parameter in S3 URI: 'regoin'"),
        ("s3://", "names no bucket"),
        ("file://host/run", "cannot be reached: Unsupported hostname"),
        ("github://x/y", "cannot be reached: "),
    ],
)
def test_a_uri_that_leads_nowhere_is_said(uri: str, why: str) -> None:
    assert refused(open_storage, uri).startswith(f"{uri}: {why}")


def test_local_places_are_folders_however_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("a/run", tmp_path / "a" / "run", str(tmp_path / "a" / "run"), f"file://{tmp_path}/a/run", "~/a/run"):
        there = open_storage(place)
        assert isinstance(there, Folder)
        with there.writing("x") as path:
            path.write_text(str(place))
        assert (tmp_path / "a" / "run" / "x").read_text() == str(place)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_where_things_are_is_said_without_the_options_of_a_uri() -> None:
    there = open_storage("s3://bucket/a/run/?region=us-east-1")
    assert there.at("level-1/level.json") == "s3://bucket/a/run/level-1/level.json"
    assert there.at() == "s3://bucket/a/run"


@given(lineage=st.sampled_from([SEARCH, IMP, DENSE]), level=st.integers(0, 10**6))
def test_a_level_s_name_has_nothing_of_the_user_s_in_it(lineage: str, level: int) -> None:
    assert level_name(lineage, level) in ("dense", f"level-{level}", f"imp/level-{level}")


def test_no_name_in_a_spec_changes_or_leaves_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model and rows under plain names, and under names that climb, point elsewhere, or look like a run's."""
    inputs = tmp_path / "inputs"
    columns = dict(zip(("text", "label"), reviews(60), strict=True))
    found = {}
    for kind, where in (("plain", "data"), ("odd", "level-1/../x/../level.json")):
        model = tiny_model(inputs / kind / where / "model")
        for name in ("train", "report"):
            write_table(inputs / kind / where / f"..{name}..csv", columns)
        here = tmp_path / kind
        here.mkdir()
        monkeypatch.chdir(here)
        relative = os.path.relpath(inputs / kind, here)
        spec = {
            "model": str(model) if kind == "plain" else f"{relative}/{where}/../{Path(where).name}/model",
            "task": {
                "train": str(inputs / kind / where / "..train..csv"),
                "report": f"{relative}/{where}/..report..csv",
                "text": "text",
            },
            "levels": [0.5],
            "candidates": {"count": 1, "ratios": [0.02]},
            "dense": {"epochs": 1},
            "probe": {"epochs": 1},
            "finetune": {"epochs": 1},
            "distill": False,
        }
        before = {path for path in tmp_path.rglob("*") if here not in path.parents}
        search(make_spec(spec), "run", Silent(), in_process=True)
        after = {path for path in tmp_path.rglob("*") if here not in path.parents}
        assert after == before
        assert [entry.name for entry in here.iterdir()] == ["run"]
        found[kind] = sorted(path.relative_to(here).as_posix() for path in here.rglob("*"))
    assert found["odd"] == found["plain"]


# --- killed and continued on S3 --------------------------------------------------------------------------------------

SHORT = (
    "levels=[0.5, 0.9]",
    "candidates.count=3",
    "dense.epochs=1",
    "finetune.epochs=0.2",
    "imp.epochs=0.2",
    "probe.epochs=0.2",
)


def found(result: Result) -> list[Any]:
    return [(level.digest, level.winner.candidate, level.winner.score) for level in result.levels]


def shown(run: str) -> str:
    out = io.StringIO()
    show_run(Console(file=out, width=300), run, as_json=False)
    return out.getvalue()


@pytest.mark.faults
def test_kill_9_in_the_middle_of_a_level_on_s3_and_the_same_command_find_the_same_mask(
    bucket: Place, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and continued by the command line, with its own patience for dead drivers."""
    undisturbed = search(load_spec(spec_path(None), SHORT), tmp_path / "local", Silent(), in_process=True)
    overrides = [word for override in SHORT for word in ("--set", override)]
    raymask = str(Path(sys.executable).with_name("raymask"))
    command = [raymask, "search", "--in-process", "--run", bucket.uri, *overrides]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    said = iter(victim.stdout.readline, "")
    assert any("level 2/2, sparsity 90.00%: early evaluation" in line for line in said)
    assert any("score" in line for line in said)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    known = bucket.files()
    journals = {name: data for name, data in known.items() if name.endswith("evaluations.jsonl")}
    assert sorted(journals) == ["level-1/evaluations.jsonl", "level-2/evaluations.jsonl"]
    assert 1 <= journals["level-2/evaluations.jsonl"].count(b"\n") < 4

    copy = tmp_path / "copy"
    fs.copy_files(bucket.root, str(copy), bucket.filesystem, fs.LocalFileSystem())
    assert f"{copy}: stopped" in shown(str(copy))

    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is held by another driver: looking for 15 s whether it is alive" in done.stdout
    assert undisturbed.levels[-1].digest in done.stdout
    after = bucket.files()
    assert all(after[name].startswith(data) for name, data in journals.items())
    assert all(after[name] == data for name, data in known.items() if name.endswith(("level.json", ".safetensors")))
    store = RunDir(bucket.uri)
    result = store.read_result()
    assert result is not None
    for level in (1, 2):
        keys = [found.candidate for found in store.evaluations(level)]
        assert len(keys) == len(set(keys)) == after[f"level-{level}/evaluations.jsonl"].count(b"\n") == 4
    assert found(result) == found(undisturbed)
    assert result.rows == undisturbed.rows
    assert sorted(after) == sorted(Place("", fs.LocalFileSystem(), str(tmp_path / "local")).files())

    show = subprocess.run([raymask, "show", bucket.uri], capture_output=True, text=True, timeout=100)
    assert show.returncode == 0, show.stderr
    assert undisturbed.levels[-1].digest in show.stdout
    finished = tmp_path / "finished"
    fs.copy_files(bucket.root, str(finished), bucket.filesystem, fs.LocalFileSystem())
    assert undisturbed.levels[-1].digest in shown(str(finished))
    assert f"{finished}: finished" in shown(str(finished))
