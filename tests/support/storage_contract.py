"""Tests that every storage passes: one class, for whichever storage a test file has."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs
from support.builders import refused
from support.records import checkpoint, evaluation, write

from raymask.config import make_spec
from raymask.core.lineage import DENSE, IMP, SEARCH
from raymask.runs import local_storage, object_storage, storage
from raymask.runs.open import open_storage
from raymask.runs.run_dir import MODEL, RunDir, open_run
from raymask.runs.storage import Storage
from raymask.testing import check_storage

HOLDS = ("lock", "claims", "beats")  # what a driver holds a place by
GO_ON = "Fix this and run the same command again"
QUICKSTART = {"model": "quickstart", "task": "quickstart"}


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


def folder_at(path: Path) -> Place:
    return Place(str(path), fs.LocalFileSystem(), str(path))


def memory_at(name: str) -> Place:
    """A place in fsspec's memory."""
    return Place(f"memory://{name}", fs.PyFileSystem(fs.FSSpecHandler(MemoryFileSystem())), f"/{name}")


def fill(store: RunDir) -> None:
    """A run of one level, as a search would leave it."""
    with open_run(store, make_spec(QUICKSTART)):
        write(store, DENSE, 0)
        for index in range(3):
            store.append(evaluation(index))
        for lineage in (SEARCH, IMP):
            write(store, lineage, 1)


class StorageContract:
    """A test class that derives from it has a fixture `place`, a place of each test's own."""

    def test_every_rule_of_a_storage_is_kept(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        """Drivers look at each other ten times as often as usual, or more."""
        hasty = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds / 10, 0.1)), monotonic=time.monotonic)
        for module in (local_storage, object_storage):
            monkeypatch.setattr(module, "time", hasty)
        monkeypatch.setattr(object_storage, "HEARTBEAT_INTERVAL_S", 0.05)
        monkeypatch.setattr(object_storage, "MAX_HEARTBEAT_POLLS", 200)
        check_storage(place.open)
        assert sorted(place.files()) == sorted(place.open().names()), "nothing else lies there"

    def test_ctrl_c_at_any_moment_leaves_what_was_there_or_what_was_to_be(self, place: Place) -> None:
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
            expected = storage.complete_lines(now)

    def test_a_run_is_laid_out_byte_for_byte_as_in_a_folder(self, place: Place, tmp_path: Path) -> None:
        """So that a run can be copied from one storage to another and gone on with."""
        fill(RunDir(place.uri))
        fill(RunDir(tmp_path / "reference"))
        local = Place("", fs.LocalFileSystem(), str(tmp_path / "reference"))
        assert place.files() == local.files()
        assert sorted(RunDir(place.uri).storage.names()) == sorted(local.files())
        assert "level-1/evaluations.jsonl" in local.files()
        assert sum(name.endswith("level.json") for name in local.files()) == 3

    def test_a_run_is_read_back_from_any_storage(self, place: Place) -> None:
        fill(RunDir(place.uri))
        store = RunDir(place.uri)
        assert store.evaluations(1) == [evaluation(index) for index in range(3)]
        assert store.has_level(DENSE, 0)
        assert not store.has_level(SEARCH, 2)
        assert store.read_level(SEARCH, 1) == store.read_level(IMP, 1)
        assert np.array_equal(store.read_weights(SEARCH, 1).buffer, checkpoint().weights.buffer)
        assert np.array_equal(store.read_logits(IMP, 1), checkpoint().test_outputs)
        assert store.read_spec() == make_spec(QUICKSTART)
        assert store.has_progress()
        assert not [name for name in store.downloadable_files() if name.endswith(".safetensors")]

    def test_what_is_damaged_or_gone_is_said_with_its_place(self, place: Place) -> None:
        """What counts as damage is shown in a folder, in test_run_dir."""
        store = RunDir(place.uri)
        write(store)
        record, where = store.level_uri(SEARCH, 1), store.storage.at(f"level-1/{MODEL}")
        place.write(f"level-1/{MODEL}", place.read(f"level-1/{MODEL}")[:-3])
        said = refused(store.read_weights, SEARCH, 1)
        assert said == (
            f"{where}: is not what was written there (its hash differs). Delete {record} to do this level again"
        )
        place.filesystem.delete_file(f"{place.root}/level-1/{MODEL}")
        assert f"{where}: is gone. Delete " in refused(store.read_weights, SEARCH, 1)
        place.write("level-1/level.json", place.read("level-1/level.json")[:-3])
        assert (
            refused(RunDir(place.uri).read_level, SEARCH, 1)
            == f"{record}: is damaged. Delete it to do this level again"
        )
        for index in (0, 1):
            store.append(evaluation(index))
        journal = place.read("level-1/evaluations.jsonl")
        place.write("level-1/evaluations.jsonl", journal[:-20])
        assert store.evaluations(1) == [evaluation(0)]
        place.write("level-1/evaluations.jsonl", journal[:9] + b"#" + journal[10:])
        said = refused(store.evaluations, 1)
        where = store.storage.at("level-1/evaluations.jsonl")
        assert said == f"{where}: line 1 is damaged. Delete the file to evaluate this level again"
