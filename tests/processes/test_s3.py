"""Runs in an object store: they survive what happens to drivers and to the store, and are the same as in a folder."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.builders import refused
from support.records import checkpoint, evaluation, write
from support.s3_server import ACCESS_DENIED, BUCKET, S3Server
from support.storage_contract import GO_ON, QUICKSTART, Place, StorageContract, folder_at

from raymask.config import make_spec
from raymask.core.errors import UserError
from raymask.core.lineage import SEARCH
from raymask.runs import object_storage
from raymask.runs.object_storage import ObjectStorage
from raymask.runs.open import open_storage
from raymask.runs.run_dir import RunDir, check_run, open_run


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path) -> Place:
    """A place of this test's own on the S3 server."""
    return Place(s3.uri(tmp_path.name), s3.filesystem(), f"{BUCKET}/{tmp_path.name}")


class TestBucket(StorageContract):
    @pytest.fixture
    def place(self, bucket: Place) -> Place:
        return bucket


# --- one driver at a time --------------------------------------------------------------------------------------------

BEAT = 0.1
DRIVER = f"""
import sys
from raymask.core.errors import UserError
from raymask.runs import object_storage
from raymask.runs.open import open_storage
object_storage.HEARTBEAT_INTERVAL_S = {BEAT}
place = open_storage(sys.argv[1])
try:
    with place.lock():
        print("held", flush=True)
        for line in sys.stdin:
            place.append("journal", line.strip().encode())
            print("written", flush=True)
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """How often is a driver looked at before it counts as dead? In this process, which looks ten times a second."""
    hasty = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10), monotonic=time.monotonic)
    monkeypatch.setattr(object_storage, "time", hasty)
    monkeypatch.setattr(object_storage, "HEARTBEAT_INTERVAL_S", BEAT)

    def set_looks(count: int) -> None:
        monkeypatch.setattr(object_storage, "MAX_HEARTBEAT_POLLS", count)

    set_looks(200)  # the living have 20 s for a sign of life, on a busy machine too
    return set_looks


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
            first = Driver(process)
            assert first.says() == "held"
            yield first
        finally:
            process.kill()


@pytest.fixture(params=["folder", "bucket"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place that other processes reach too."""
    if request.param == "folder":
        return folder_at(tmp_path / "run")
    found: Place = request.getfixturevalue("bucket")
    return found


@pytest.mark.usefixtures("looks")
def test_a_second_driver_is_refused_while_the_first_lives_and_free_to_go_on_when_it_ended(shared: Place) -> None:
    spec = make_spec(QUICKSTART)
    told: list[str] = []
    with driver(shared) as first:
        assert first.writes("one") == "written"
        assert shared.open().is_locked()
        assert list(shared.open().names()) == ["journal"]
        where = shared.open().at()
        other = f"{where}: is not empty and not a run directory: choose another with --run"
        assert refused(check_run, RunDir(shared.uri), spec) == other
        shared.write("spec.yaml", b"")
        busy = f"{where}: another raymask is working in it; wait for it, or choose another with --run"
        assert refused(check_run, RunDir(shared.uri), spec) == busy
        assert refused(open_run(RunDir(shared.uri), spec).__enter__) == busy
        said = refused(shared.open().lock().__enter__)
        assert said.startswith(f"{where}: another raymask ")
        assert "wait for it" in said
        assert first.writes("two") == "written"
        assert first.process.stdin is not None
        first.process.stdin.close()
        first.process.wait(30)
    assert not shared.open(told.append).is_locked()
    there = shared.open(told.append)
    with there.lock():
        there.append("journal", b"three")
    assert told == [], "a hold that was given back need not be watched"
    assert shared.read("journal") == b"one\ntwo\nthree\n"


def test_the_hold_of_a_killed_driver_does_not_block_for_ever(shared: Place, looks: Callable[[int], None]) -> None:
    with driver(shared) as first:
        first.process.kill()
        first.process.wait()
    told: list[str] = []
    there = shared.open(told.append)
    looks(3)
    assert not there.is_locked()
    with there.lock():
        looks(200)
        assert shared.open().is_locked()
        there.append("journal", b"mine")
    watched = [f"{there.at()} is held by another driver: checking for 3 s whether it is alive"]
    expected = watched if isinstance(there, ObjectStorage) else []
    assert told == expected, "the second time it is held for dead at once"
    assert not shared.open(told.append).is_locked()
    assert told == expected, "the dead driver's hold is gone"


def test_a_driver_that_was_held_for_dead_writes_no_more_and_says_so(
    bucket: Place, looks: Callable[[int], None]
) -> None:
    """A machine that sleeps, or loses the network for a while, and finds another driver in its place."""
    looks(3)
    with driver(bucket) as first:
        assert first.writes("one") == "written"
        first.process.send_signal(signal.SIGSTOP)
        there = bucket.open()
        with there.lock():
            there.append("journal", b"two")
            first.process.send_signal(signal.SIGCONT)
            base = bucket.uri.partition("?")[0]
            said = f"{base}: another raymask has taken it over, since this one sent no heartbeat"
            assert first.writes("never") == said
            first.process.wait(30)
            there.append("journal", b"three")
    assert bucket.read("journal") == b"one\ntwo\nthree\n"


# --- a storage that answers with errors ------------------------------------------------------------------------------


def impatient(s3: S3Server, place: Place, note: Callable[[str], None] = lambda text: None) -> RunDir:
    """A run directory whose client leaves all patience to us."""
    store = RunDir(place.uri, note)
    assert isinstance(store.storage, ObjectStorage)
    store.storage.filesystem = s3.impatient()
    return store


@pytest.mark.parametrize("work", [lambda store: store.append(evaluation(0)), write], ids=["line", "level"])
def test_what_is_written_survives_an_outage_and_it_is_told(
    bucket: Place, s3: S3Server, work: Callable[[RunDir], object]
) -> None:
    told: list[str] = []
    with ExitStack() as outage:

        def note(text: str) -> None:
            told.append(text)
            if len(told) == 2:
                outage.close()

        store = impatient(s3, bucket, note)
        outage.enter_context(s3.outage())
        work(store)
    where = bucket.uri.partition("?")[0]
    assert len(told) == 2
    assert all(text.startswith(f"{where} answers with an error, trying again: When ") for text in told)
    there = RunDir(bucket.uri)
    if work is write:
        assert np.array_equal(there.read_weights(SEARCH, 1).buffer, checkpoint().weights.buffer)
    else:
        assert there.evaluations(1) == [evaluation(0)]


@pytest.mark.parametrize("done", ["read", "written"])
def test_an_outage_that_does_not_end_is_an_error_that_says_how_to_go_on(
    bucket: Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch, done: str
) -> None:
    monkeypatch.setattr(object_storage, "MAX_OUTAGE_S", 0.1)
    store = impatient(s3, bucket)
    store.append(evaluation(0))
    with s3.outage(), pytest.raises(UserError) as raised:
        if done == "read":
            store.evaluations(1)
        else:
            store.write_text("spec.yaml", "x")
    assert str(raised.value).startswith(f"{store.storage.at()}: cannot be {done}: When ")
    assert str(raised.value).endswith(GO_ON)
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
        for work in (
            lambda: there.has("a"),
            lambda: list(there.names()),
            lambda: there.append("a", b"x"),
            there.is_locked,
        ):
            assert ": cannot be read: When " in refused(work)
    with there.writing("a") as path, ExitStack() as denied:
        path.write_text("x")
        denied.enter_context(s3.outage(answer))
        assert ": cannot be written: When initiating " in refused(there.upload, "a", path)
    assert told == []


def test_a_bucket_that_is_none_is_said_at_once(s3: S3Server) -> None:
    told: list[str] = []
    there = open_storage(s3.uri("run", bucket="missing"), told.append)
    assert not there.has("spec.yaml")
    assert "NO_SUCH_BUCKET" in refused(there.lock().__enter__)
    assert told == []
