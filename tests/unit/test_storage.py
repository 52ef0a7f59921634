"""Run directories in a folder, in memory and in an object store: locks, outages, damage."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import fs
from support.builders import refused, reviews, tiny_model, write_table
from support.records import checkpoint, evaluation, write
from support.storage_contract import GO_ON, Place, StorageContract, folder_at, memory_at

from raymask.config import make_spec
from raymask.core.errors import UserError
from raymask.core.lineage import DENSE, IMP, SEARCH
from raymask.core.records import LevelRecord
from raymask.core.tensors import pack
from raymask.driver.search import search
from raymask.runs import local_storage, object_storage, storage
from raymask.runs import open as open_module
from raymask.runs.local_storage import LocalStorage
from raymask.runs.object_storage import ObjectStorage
from raymask.runs.open import open_storage
from raymask.runs.run_dir import RunDir, level_name, write_tensors


@pytest.fixture
def memory(tmp_path: Path) -> Place:
    """A place of this test's own in fsspec's memory."""
    return memory_at(tmp_path.name)


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return folder_at(tmp_path / "run")


class TestStorage(StorageContract):
    @pytest.fixture(params=["folder", "memory"])
    def place(self, request: pytest.FixtureRequest) -> Place:
        found: Place = request.getfixturevalue(request.param)
        return found


Slept = Callable[[int], None]


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> Callable[[Slept], list[float]]:
    """Drivers of this process do not sleep: what is given is called with the count of sleeps so far instead.

    Returns how long they would have slept.
    """

    def instead(then: Slept) -> list[float]:
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            then(len(slept))

        for module in (local_storage, object_storage):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0))
        return slept

    return instead


# --- files -----------------------------------------------------------------------------------------------------------


def test_who_reads_while_a_file_is_replaced_reads_the_old_one_to_its_end(folder: Place) -> None:
    there = folder.open()
    with there.writing("file") as path:
        path.write_text("old")
    with there.reading("file") as place, place.open() as reader:
        with there.writing("file") as path:
            path.write_text("new")
        assert reader.read() == "old"
    assert there.read("file") == b"new"


def test_what_a_killed_driver_left_half_written_counts_for_nothing(folder: Place) -> None:
    there = Path(folder.uri)
    for name in ("level-1/model.safetensors.part", "export.part/config.json"):
        (there / name).parent.mkdir(parents=True)
        (there / name).write_text("half")
    assert list(folder.open().names()) == []
    with folder.open().writing_folder("export") as path:
        (path / "x").write_text("whole")
    assert "export.part/config.json" not in folder.files()


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
        assert f"cannot be read: Stale file handle. {GO_ON}" in said
        assert "Delete" not in said


def test_what_belongs_to_someone_else_is_said_with_its_owner(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read and write everything, so the refusal is simulated."""

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write(RunDir(folder.uri))
    whose = f"Permission denied (it belongs to {Path(folder.uri).owner()}). {GO_ON}"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        said = refused(RunDir(folder.uri).read_level, SEARCH, 1)
    assert said == f"{folder.uri}/level-1/level.json: cannot be read: {whose}"
    monkeypatch.setattr(Path, "mkdir", refuse)
    said = refused(open_storage(folder.uri, option="--out").writing_folder("export").__enter__)
    assert said == f"{folder.uri}/export: cannot be written: {whose}, or choose another location with --out"


def test_a_name_that_would_lead_out_of_a_folder_counts_for_nothing(memory: Place) -> None:
    """Whoever can write to a bucket must not write to the machine of whoever fetches from it."""
    for name in ("../../evil.txt", "/absolute", "export/../../evil"):
        with memory.filesystem.open_output_stream(f"{memory.root}/{name}") as stream:
            stream.write(b"x")
    memory.write("result.json", b"{}")
    assert list(memory.open().names()) == ["result.json"]
    assert not any(map(storage.is_run_file, ("../x", "/x", "a//b", "a/../../x", ".", "./x")))


# --- one driver at a time --------------------------------------------------------------------------------------------


def test_a_driver_that_wakes_up_after_it_was_held_for_dead_is_looked_at_again(
    memory: Place, sleeping: Callable[[Slept], list[float]]
) -> None:
    """Between the look before anything is read, and the one before anything is written, minutes may pass."""
    there, awake = memory.open(), False

    def beat(count: int) -> None:
        if awake:
            memory.write("beats/sleeper", str(7 + count).encode())

    looks = sleeping(beat)
    with there.writing("claims/sleeper") as path:
        path.touch()
    with there.writing("beats/sleeper") as path:
        path.write_text("7")
    assert not there.is_locked()
    assert looks == [1.0] * object_storage.MAX_HEARTBEAT_POLLS
    memory.write("beats/sleeper", b"8")
    awake = True
    assert "another raymask is working in it" in refused(there.lock().__enter__)
    assert len(looks) == object_storage.MAX_HEARTBEAT_POLLS + 1
    awake = False
    with there.lock():
        assert not memory.open().has("claims/sleeper")


def test_a_driver_that_ends_while_it_is_looked_at_is_not_waited_for(
    memory: Place, sleeping: Callable[[Slept], list[float]]
) -> None:
    with ExitStack() as first:
        first.enter_context(memory.open().lock())
        looks = sleeping(lambda count: first.close())
        assert not memory.open().is_locked()
    assert len(looks) == 1


def test_a_sign_of_life_that_comes_late_does_not_bring_a_claim_back(memory: Place) -> None:
    first, second = memory.open(), memory.open()
    assert isinstance(first, ObjectStorage)
    assert isinstance(second, ObjectStorage)
    with first.lock():
        second.remove_claim(first.mine.rpartition("/")[2])
        memory.write(first.mine.replace("claims", "beats"), b"99")
        assert "another raymask has taken it over" in refused(first.append, "journal", b"x")
        assert not second.is_locked()
    assert memory.files() == {}


class World:
    """A time of its own for threads, of which one runs at a time: the one whose turn comes first."""

    def __init__(self, seed: int, slowest: float, outage: tuple[float, float]) -> None:
        self.now, self.outage = 0.0, outage
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
    """A file system every answer of which takes a while, and is an error during an outage."""

    def __init__(self, world: World, inner: Any) -> None:
        self.world, self.inner = world, inner
        self.type_name = inner.type_name

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.world.sleep(self.world.random.uniform(0, self.world.slowest))
            begin, end = self.world.outage
            if begin <= self.world.now < end:
                raise OSError("AWS Error SLOW_DOWN")
            return getattr(self.inner, name)(*arguments, **options)

        return call


class SlowBucket(ObjectStorage):
    def upload_once(self, name: str, path: Path) -> None:
        with self.filesystem.open_output_stream(f"{self.root}/{name}") as stream:
            stream.write(path.read_bytes())


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    starts=st.lists(st.sampled_from([0.0, 0.0, 1.0, 5.0, 14.0, 16.0, 30.0]), min_size=2, max_size=4),
    stays=st.sampled_from([0.0, 10.0, 60.0]),
    dead=st.booleans(),
    slowest=st.sampled_from([0.0, 0.2, 3.0]),
    outage=st.sampled_from([(0.0, 0.0), (0.0, 0.0), (4.0, 30.0), (15.0, 100.0), (17.0, 22.0)]),
)
@example(seed=0, starts=[0.0, 1.0], stays=60.0, dead=False, slowest=0.2, outage=(1.5, 40.0))
def test_of_drivers_that_come_at_any_time_one_at_most_is_in(
    seed: int, starts: list[float], stays: float, dead: bool, slowest: float, outage: tuple[float, float]
) -> None:
    """The protocol itself, its own numbers and all, on a storage that takes up to 3 s for each answer.

    An outage may be longer than a driver may be without a sign of life; nobody is held for dead in it.
    """
    root = f"/world-{seed}-{len(starts)}"
    with suppress(FileNotFoundError):
        MemoryFileSystem().rm(root, recursive=True)
    inner = fs.PyFileSystem(fs.FSSpecHandler(MemoryFileSystem()))
    for folder in ("claims", "beats"):
        inner.create_dir(f"{root}/{folder}", recursive=True)
        if dead:
            Place("", inner, root).write(f"{folder}/long-ago", b"7")
    world = World(seed, slowest, outage)
    inside: list[int] = []
    entered: list[int] = []
    refusals: list[str] = []
    crowds: list[list[int]] = []

    def drive(number: int, start: float) -> None:
        world.sleep(start)
        there = SlowBucket("memory://", Slow(world, inner), root, lambda text: None)
        try:
            with there.lock():
                inside.append(number)
                entered.append(number)
                crowds.append(list(inside))
                world.sleep(stays)
                there.append("journal", str(number).encode())
                inside.remove(number)
        except UserError as error:
            refusals.append(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_storage, "time", SimpleNamespace(sleep=world.sleep, monotonic=lambda: world.now))
        patch.setattr(object_storage, "threading", SimpleNamespace(Thread=world.thread, Event=world.event))
        world.running = 1  # this thread
        drivers = [world.thread(drive, args) for args in enumerate(starts)]
        for one in drivers:
            one.start()
        for one in drivers:
            one.join()
    assert all(len(crowd) == 1 for crowd in crowds)
    assert len(entered) + len(refusals) == len(starts)
    assert all("another raymask is working in it; wait for it" in said for said in refusals)
    if len(set(starts)) == len(starts) and sorted(starts)[1] - min(starts) >= 14 and slowest < 1 and outage[1] == 0:
        assert starts.index(min(starts)) in entered, "who comes first and alone is never refused"
    written = Place("", inner, root).files().get("journal", b"").split()
    assert written == [str(number).encode() for number in entered]


def no_locks(file: Any, kind: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_is_refused(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder.open().lock():
        pass
    monkeypatch.setattr(fcntl, "flock", no_locks)
    expected = (
        f"{folder.uri}: its file system has no locks (No locks available), so that two drivers could work in it at "
        f"once. {GO_ON}"
    )
    assert refused(folder.open().lock().__enter__) == expected
    assert refused(folder.open().is_locked) == expected


def test_on_nfs_a_hold_is_seen_without_the_right_to_write(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS gives an exclusive lock only to those who opened the file for writing (flock(2))."""
    flock = fcntl.flock

    def like_nfs(file: Any, kind: int) -> None:
        if kind & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", like_nfs)
    with folder.open().lock():
        assert folder.open().is_locked()
    assert not folder.open().is_locked()


def test_two_that_look_do_not_see_a_driver_in_each_other(folder: Place) -> None:
    with folder.open().lock():
        pass
    with Path(folder.uri, "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not folder.open().is_locked()


def test_a_driver_is_not_refused_for_one_who_only_looks(
    folder: Place, sleeping: Callable[[Slept], list[float]]
) -> None:
    with folder.open().lock():
        pass
    with Path(folder.uri, "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        waited = sleeping(lambda count: fcntl.flock(other, fcntl.LOCK_UN) if count == 2 else None)
        with folder.open().lock():
            assert len(waited) == 2


def test_who_loses_the_race_for_a_folder_is_told(folder: Place, sleeping: Callable[[Slept], list[float]]) -> None:
    sleeping(lambda count: None)
    with folder.open().lock():
        said = refused(folder.open().lock().__enter__)
    assert said == f"{folder.uri}: another raymask has just started in it; wait for it"


# --- a storage that answers with errors ------------------------------------------------------------------------------


def test_what_is_missing_is_an_answer_to_who_reads_and_an_error_to_who_writes(memory: Place) -> None:
    """So fsspec's storages speak of a bucket that is none."""

    def missing() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "bucket")

    there = memory.open()
    assert isinstance(there, ObjectStorage)
    with pytest.raises(FileNotFoundError):
        there.with_retries("read", missing)
    assert "cannot be written: [Errno 2] No such file or directory: 'bucket'. Fix this" in refused(
        there.with_retries, "written", missing
    )


def test_a_storage_that_nobody_writes_to_is_said() -> None:
    told: list[str] = []
    there = open_storage("http://127.0.0.1:9/run", told.append)
    assert refused(there.lock().__enter__).startswith("http://127.0.0.1:9/run: cannot be written: ")
    assert told == []


def test_google_s_client_is_not_left_to_be_patient_alone() -> None:
    """Without credentials or a network it would try for a quarter of an hour before anything is said."""
    assert object_storage.limit_gcs_retries("gs://b/run") == "gs://b/run?retry_limit_seconds=5"
    assert (
        object_storage.limit_gcs_retries("gcs://b/run?scheme=http") == "gcs://b/run?scheme=http&retry_limit_seconds=5"
    )
    for other in ("gs://b/run?retry_limit_seconds=9", "s3://b/run?region=x"):
        assert object_storage.limit_gcs_retries(other) == other
    assert open_storage("gs://b/run").uri == "gs://b/run"


# --- a disk that is full, or not ours to write -----------------------------------------------------------------------


LIBC = ctypes.CDLL(None)
READ_ONLY, REMOUNT = 1, 32  # mount(2)'s flags


class Disk:
    """A file system of one MiB."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, flags: int, options: str = "") -> bool:
        path = os.fsencode(self.path)
        return bool(LIBC.mount(b"tmpfs", path, b"tmpfs", ctypes.c_ulong(flags), options.encode()) == 0)

    def unmount(self) -> None:
        assert LIBC.umount(os.fsencode(self.path)) == 0

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
    if os.geteuid() != 0 or not found.mount(0, "size=1m"):
        pytest.skip("only root may mount a small file system")
    try:
        yield found
    finally:
        found.unmount()


LARGE = pack({"a": torch.ones(2**19)})  # 2 MiB


def write_large(store: RunDir) -> LevelRecord:
    """A level whose model has 2 MiB."""
    with tempfile.TemporaryDirectory() as elsewhere:
        record = write(RunDir(elsewhere))
    return store.write_level(SEARCH, 1, replace(checkpoint(), weights=LARGE), record)


def test_a_level_that_does_not_fit_is_said_and_written_once_there_is_room(disk: Disk) -> None:
    store = RunDir(disk.path / "run", option="--run")
    said = refused(write_large, store)
    assert said.startswith(f"{disk.path}/run/level-1/model.safetensors: cannot be written: ")
    assert "No space left on device" in said
    assert said.endswith(f"{GO_ON}, or choose another location with --run")
    assert list(store.storage.names()) == []
    assert not any(path.is_file() for path in disk.path.rglob("*"))
    assert disk.mount(REMOUNT, "size=8m")
    write_large(store)
    assert np.array_equal(store.read_weights(SEARCH, 1).buffer, LARGE.buffer)


def test_a_line_that_does_not_fit_is_said_and_the_journal_keeps_what_it_had(disk: Disk) -> None:
    store = RunDir(disk.path / "run")
    store.append(evaluation(0))
    disk.fill(left=8192)
    long = evaluation(1).model_copy(update={"row_losses": bytes(50_000)})
    said = refused(store.append, long)
    where = f"{disk.path}/run/level-1/evaluations.jsonl"
    assert said == f"{where}: cannot be written: No space left on device. {GO_ON}"
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
    said, elsewhere = refused(prepare), "or choose another location with TMPDIR"
    assert said == f"the folder for temporary files: cannot be written: No space left on device. {GO_ON}, {elsewhere}"
    assert memory.files() == {}
    assert list(disk.path.iterdir()) == []


def test_a_place_that_is_not_ours_to_write_is_said_and_still_read(disk: Disk) -> None:
    there = open_storage(disk.path / "run")
    with there.lock():
        there.append("journal", b"line")
    assert disk.mount(REMOUNT | READ_ONLY)

    def file() -> None:
        with there.writing("file") as path:
            path.write_text("x")

    for name, work in (
        ("/file", file),
        ("/export", there.writing_folder("export").__enter__),
        ("/journal", lambda: there.append("journal", b"x")),
        ("", there.lock().__enter__),
    ):
        assert refused(work) == f"{there.at()}{name}: cannot be written: Read-only file system. {GO_ON}"
    assert there.read("journal") == b"line\n"
    assert not there.is_locked()


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
    assert not open_module.SECRET.search(uri)


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
        assert isinstance(there, LocalStorage)
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
    """The same model and rows under plain names, and under names that go up, point elsewhere, or look like a run's."""
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
                "test": f"{relative}/{where}/..report..csv",
                "text": "text",
            },
            "levels": [0.5],
            "candidates": {"count": 1, "sampling_ratios": [0.02]},
            "dense": {"epochs": 1},
            "early_eval": {"epochs": 1},
            "finetune": {"epochs": 1},
            "distill": False,
        }
        before = {path for path in tmp_path.rglob("*") if here not in path.parents}
        search(make_spec(spec), "run", in_process=True)
        after = {path for path in tmp_path.rglob("*") if here not in path.parents}
        assert after == before
        assert [entry.name for entry in here.iterdir()] == ["run"]
        found[kind] = sorted(path.relative_to(here).as_posix() for path in here.rglob("*"))
    assert found["odd"] == found["plain"]
