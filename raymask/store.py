"""What is written where, and when is it done?

    <run>/spec.yaml env.json lock     what was asked; versions per start; held while a driver runs
          dense/                      the fine-tuned dense model, laid out like a level
          level-N/evaluations.jsonl   the journal: one line per evaluation, appended as it arrives
                  mask.safetensors model.safetensors optimizer.safetensors report.safetensors
                  level.json          written last: it exists, so the level is done
          level-0/                    the dense model after distillation, where there is any
          imp/level-N/                the same for the baseline
          export/ result.json

One writer, the driver. Every file is written beside its place and renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, from_numpy

from raymask.core.errors import UserError
from raymask.core.records import Checkpoint, Evaluation, Level, Result
from raymask.core.spec import Spec, identity
from raymask.core.tensors import Packed, pack

SPEC, ENV, LOCK, RESULT, EXPORT = "spec.yaml", "env.json", "lock", "result.json", "export"
JOURNAL, LEVEL = "evaluations.jsonl", "level.json"
MASK, MODEL, OPTIMIZER, REPORT = "mask.safetensors", "model.safetensors", "optimizer.safetensors", "report.safetensors"
DENSE, SEARCH, IMP = "dense", "", "imp"
"""The lineages: the dense model alone, the search, and the baseline."""


class RunDir:
    """The only thing that knows a run directory's file names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def level_path(self, lineage: str, level: int) -> Path:
        """Where a level of a lineage lies; the dense model has one level only."""
        return self.path / DENSE if lineage == DENSE else self.path / lineage / f"level-{level}"

    @property
    def export_path(self) -> Path:
        return self.path / EXPORT

    def has_work(self) -> bool:
        """Whether anything finished is there: a level's record, or a journal."""
        return any(next(self.path.rglob(name), None) for name in (LEVEL, JOURNAL))

    def busy(self) -> bool:
        """Whether a driver is working in it now."""
        if not (self.path / LOCK).exists():
            return False
        with (self.path / LOCK).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    # --- the journal ---------------------------------------------------------------------------------------------

    def append(self, evaluation: Evaluation) -> None:
        """Add one line to the level's journal and force it to disk. A torn tail from an earlier end is cut first."""
        path = self.level_path(SEARCH, evaluation.candidate.level) / JOURNAL
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as journal:
            end = journal.seek(0, os.SEEK_END)
            journal.seek(0)
            whole = journal.read().rfind(b"\n") + 1
            if whole < end:
                journal.truncate(whole)
            journal.write(evaluation.model_dump_json().encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())

    def evaluations(self, level: int) -> list[Evaluation]:
        """The journal's records. A torn last line is what a kill leaves, and is passed over; any other is an error."""
        path = self.level_path(SEARCH, level) / JOURNAL
        if not path.exists():
            return []
        *lines, _torn = path.read_bytes().split(b"\n")
        found: dict[int, Evaluation] = {}
        for number, line in enumerate(lines, 1):
            try:
                evaluation = Evaluation.model_validate_json(line)
            except ValidationError:
                raise UserError(
                    f"{path}: line {number} is damaged. Delete the file to evaluate this level again"
                ) from None
            found[evaluation.candidate.index] = evaluation
        return list(found.values())

    # --- levels --------------------------------------------------------------------------------------------------

    def has_level(self, lineage: str, level: int) -> bool:
        return (self.level_path(lineage, level) / LEVEL).exists()

    def read_level(self, lineage: str, level: int) -> Level:
        """The record of a finished level."""
        path = self.level_path(lineage, level) / LEVEL
        try:
            return Level.model_validate_json(path.read_bytes())
        except ValidationError:
            raise UserError(f"{path}: is damaged. Delete it to do this level again") from None

    def write_level(self, lineage: str, level: int, checkpoint: Checkpoint, record: Level) -> Level:
        """Save a checkpoint and then, last, its record with the files' hashes, which is returned."""
        folder = self.level_path(lineage, level)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Mapping[str, Tensor]] = {
            MODEL: checkpoint.weights.views(),
            OPTIMIZER: checkpoint.optimizer.views(),
            MASK: flat_bits(checkpoint.mask),
            REPORT: {"logits": from_numpy(checkpoint.logits)},
        }
        files = {name: write_tensors(folder / name, content) for name, content in tensors.items()}
        done = record.model_copy(update={"files": files})
        write_text(folder / LEVEL, done.model_dump_json(indent=1))
        return done

    def read_tensors(self, lineage: str, level: int, name: str) -> dict[str, Tensor]:
        """One of a finished level's files, checked against its hash."""
        path = self.level_path(lineage, level) / name
        expected = self.read_level(lineage, level).files[name]
        advice = f"Delete {path.parent / LEVEL} to do this level again"
        try:
            if sha256(path) != expected:
                raise UserError(f"{path}: is not what was written there (its hash differs). {advice}")
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {error}. {advice}") from None

    def read_weights(self, lineage: str, level: int) -> Packed:
        return pack(self.read_tensors(lineage, level, MODEL))

    def read_optimizer(self, lineage: str, level: int) -> Packed:
        return pack(self.read_tensors(lineage, level, OPTIMIZER))

    def read_logits(self, lineage: str, level: int) -> np.ndarray:
        """Logits of `report`, float32 (rows, outputs)."""
        return self.read_tensors(lineage, level, REPORT)["logits"].numpy()

    # --- the run -------------------------------------------------------------------------------------------------

    def note_start(self, **facts: Any) -> None:
        """Add this start's versions, machine and `facts` to env.json."""
        path = self.path / ENV
        starts = json.loads(path.read_text()) if path.exists() else []
        packages = ("raymask", "ray", "torch", "transformers", "numpy")
        start = {
            "versions": {"python": platform.python_version()} | {name: installed(name) for name in packages},
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            **facts,
        }
        write_text(path, json.dumps([*starts, start], indent=1))

    def write_result(self, result: Result) -> None:
        write_text(self.path / RESULT, result.model_dump_json(indent=1))

    def read_result(self) -> Result | None:
        """What a finished search found, or None while it is not."""
        path = self.path / RESULT
        try:
            return Result.model_validate_json(path.read_bytes()) if path.exists() else None
        except ValidationError:
            raise UserError(f"{path}: is damaged. Delete it, and the same command writes it again") from None

    def read_spec(self) -> Spec:
        """The spec that this run was started with. Raises UserError when there is none."""
        path = self.path / SPEC
        try:
            return Spec.model_validate(yaml.safe_load(path.read_text()))
        except FileNotFoundError:
            raise UserError(f"{self.path}: is not a run directory: it has no {SPEC}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError):
            raise UserError(f"{path}: is damaged; it must be the file that raymask wrote") from None


def check_run(path: Path, spec: Spec) -> RunDir:
    """The run directory, new or old, if this spec may use it. Nothing is written.

    Raises UserError when other files, another driver, or finished work of another spec are there.
    """
    store = RunDir(path)
    if path.is_dir() and not (path / SPEC).exists() and any(entry.name != LOCK for entry in path.iterdir()):
        raise UserError(f"{path}: is not empty and not a run directory: choose another with --run")
    if store.busy():
        raise UserError(f"{path}: another raymask is working in it; wait for it, or choose another with --run")
    if store.has_work():
        before, now = identity(store.read_spec()), identity(spec)
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if differing:
            lines = "".join(f"\n  - {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing)
            raise UserError(f"{path}: was started with another spec; choose another with --run, or undo:{lines}")
    return store


@contextmanager
def open_run(path: Path, spec: Spec) -> Iterator[RunDir]:
    """The run directory, held by this process alone until the end; made when it is not there.

    Raises UserError as `check_run` does, and when the place cannot be written.
    """
    store = check_run(path, spec)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}. Choose another with --run") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another raymask has just started in it; wait for it") from None
        if not store.has_work():
            write_text(path / SPEC, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
        yield store


def flat_bits(packed: Packed) -> dict[str, Tensor]:
    """Packed mask bits as tensors for a file: uint8, with the shape beside each as int64."""
    found: dict[str, Tensor] = {}
    for name, (offset, size, shape, _) in packed.index.items():
        found[name] = from_numpy(packed.buffer[offset : offset + size])
        found[f"{name}:shape"] = from_numpy(np.array(shape, np.int64))
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file beside its place, rename it, and return its SHA-256."""
    beside = path.with_name(path.name + ".part")
    save_file(dict(tensors), beside, metadata={"format": "pt"})
    found = sha256(beside)
    rename(beside, path)
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text + "\n", encoding="utf-8")
    rename(beside, path)


def rename(beside: Path, path: Path) -> None:
    """Force a file to disk, then give it its name: after a crash there is the whole file, or none."""
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the name itself
    os.close(folder)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `path` when the block ends well."""
    beside = path.with_name(path.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def installed(package: str) -> str:
    """A package's version; empty when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
