"""What is written where, and when is it done?

    <run>/spec.yaml env.json lock     what was asked; versions per start; held while a driver runs
          dense/                      the fine-tuned dense model, laid out like a level
          level-N/evaluations.jsonl   the journal: one line per evaluation, appended as it arrives
                  mask.safetensors model.safetensors optimizer.safetensors report.safetensors
                  level.json          written last: it exists, so the level is done
          level-0/                    the dense model after distillation, where there is any
          branch-2/level-N/ ...       the same for a level's other masks, where more than one is kept
          imp/level-N/                the same for the baseline
          export/ result.json
          report.html report.json     what people and their programs look at, as far as the search is
          results.parquet             one row per early evaluation

One writer, the driver. The same in a folder and in an object store. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pyarrow import Table
from pyarrow.parquet import write_table
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, from_numpy

from raymask.core.errors import UserError
from raymask.core.masks import vacant_bits
from raymask.core.records import Checkpoint, Evaluation, Level, Place, Record, Result
from raymask.core.spec import Spec, identity
from raymask.core.tensors import Packed, pack
from raymask.storage import Note, Storage, open_storage
from raymask.version import __version__

SPEC, ENV, RESULT, EXPORT = "spec.yaml", "env.json", "result.json", "export"
PAGE, FIGURES, TABLE = "report.html", "report.json", "results.parquet"
JOURNAL, LEVEL = "evaluations.jsonl", "level.json"
MASK, MODEL, OPTIMIZER, REPORT = "mask.safetensors", "model.safetensors", "optimizer.safetensors", "report.safetensors"
DENSE, SEARCH, IMP = "dense", "", "imp"
"""The lineages: the dense model alone, the search (its first branch), and the baseline."""
SEAL = re.compile(rb'(.*),\s*"sha256":\s*"([0-9a-f]{64})"\s*}\s*', re.DOTALL)
R = TypeVar("R", bound=Record)


class RunDir:
    """The only thing that knows a run directory's file names."""

    def __init__(self, place: str | Path, note: Note = lambda text: None) -> None:
        """At a path or URI, which need not exist; `note` is told of outages. Raises UserError for no such storage."""
        self.note = note
        self.storage: Storage = open_storage(place, note)

    @property
    def uri(self) -> str:
        """Where it is, as it was asked for."""
        return self.storage.uri

    @property
    def export_uri(self) -> str:
        return self.storage.at(EXPORT)

    def has_work(self) -> bool:
        """Whether anything finished is there: a level's record, or a journal."""
        return any(name.rpartition("/")[2] in (LEVEL, JOURNAL) for name in self.storage.names())

    def results(self) -> list[str]:
        """Names of all that a user may want elsewhere: everything but tensors to go on from."""
        names = self.storage.names()
        return sorted(name for name in names if name.startswith(EXPORT) or not name.endswith(".safetensors"))

    # --- the journal ---------------------------------------------------------------------------------------------

    def append(self, evaluation: Evaluation) -> None:
        """Add one line to the level's journal, safe from any crash once this returns."""
        name = f"{level_name(SEARCH, evaluation.candidate.level)}/{JOURNAL}"
        self.storage.append(name, sealed(evaluation).encode())

    def evaluations(self, level: int) -> list[Evaluation]:
        """The journal's records. A torn last line is what a kill leaves, and is passed over; any other is an error."""
        name = f"{level_name(SEARCH, level)}/{JOURNAL}"
        try:
            *lines, _torn = self.storage.read(name).split(b"\n")
        except FileNotFoundError:
            return []
        found: dict[Place, Evaluation] = {}
        for number, line in enumerate(lines, 1):
            try:
                evaluation = unsealed(Evaluation, line)
            except ValueError:
                raise UserError(
                    f"{self.storage.at(name)}: line {number} is damaged. Delete the file to evaluate this level again"
                ) from None
            found[evaluation.place] = evaluation
        return list(found.values())

    # --- levels --------------------------------------------------------------------------------------------------

    def has_level(self, lineage: str, level: int) -> bool:
        return self.storage.has(f"{level_name(lineage, level)}/{LEVEL}")

    def finished(self) -> list[tuple[str, Level]]:
        """Every finished level behind its lineage: the dense model first, then level by level."""
        spec = self.read_spec()
        levels = range(len(spec.levels.densities()) + 1)
        places = [(DENSE, 0), *((lineage, level) for level in levels for lineage in (*branches(spec), IMP))]
        return [
            (lineage, self.read_level(lineage, level)) for lineage, level in places if self.has_level(lineage, level)
        ]

    def has_tensors(self, lineage: str, level: int, name: str) -> bool:
        """Whether a level's file is there: a run that was fetched is without them."""
        return self.storage.has(f"{level_name(lineage, level)}/{name}")

    def level_uri(self, lineage: str, level: int) -> str:
        """Where a level's record is."""
        return self.storage.at(f"{level_name(lineage, level)}/{LEVEL}")

    def read_level(self, lineage: str, level: int) -> Level:
        """The record of a finished level."""
        try:
            return unsealed(Level, self.storage.read(f"{level_name(lineage, level)}/{LEVEL}"))
        except ValueError:
            raise UserError(f"{self.level_uri(lineage, level)}: is damaged. Delete it to do this level again") from None

    def write_level(self, lineage: str, level: int, checkpoint: Checkpoint, record: Level) -> Level:
        """Save a checkpoint and then, last, its record with the files' hashes, which is returned."""
        folder = level_name(lineage, level)
        tensors: dict[str, Mapping[str, Tensor]] = {
            MODEL: checkpoint.weights.views(),
            OPTIMIZER: checkpoint.optimizer.views(),
            MASK: flat_bits(checkpoint.mask),
            REPORT: {"logits": from_numpy(checkpoint.logits)},
        }
        files = {}
        for name, content in tensors.items():
            with self.storage.writing(f"{folder}/{name}") as path:
                files[name] = write_tensors(path, content)
        done = record.model_copy(update={"files": files})
        self.write_text(f"{folder}/{LEVEL}", sealed(done, indent=1))
        return done

    def read_tensors(self, lineage: str, level: int, name: str) -> dict[str, Tensor]:
        """One of a finished level's files, checked against its hash."""
        where = f"{level_name(lineage, level)}/{name}"
        expected = self.read_level(lineage, level).files[name]
        advice = f"Delete {self.level_uri(lineage, level)} to do this level again"
        try:
            with self.storage.reading(where) as path:
                if sha256(path) != expected:
                    raise UserError(
                        f"{self.storage.at(where)}: is not what was written there (its hash differs). {advice}"
                    )
                return dict(load_file(path))
        except FileNotFoundError:
            raise UserError(f"{self.storage.at(where)}: is gone. {advice}") from None

    def read_weights(self, lineage: str, level: int) -> Packed:
        return pack(self.read_tensors(lineage, level, MODEL))

    def read_optimizer(self, lineage: str, level: int) -> Packed:
        return pack(self.read_tensors(lineage, level, OPTIMIZER))

    def read_logits(self, lineage: str, level: int) -> np.ndarray:
        """What is kept of the predictions on `report`, float32 (rows, outputs)."""
        return self.read_tensors(lineage, level, REPORT)["logits"].numpy()

    # --- the run -------------------------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> None:
        with self.storage.writing(name) as path:
            path.write_text(text + "\n", encoding="utf-8")

    def write_report(self, page: str, figures: str, table: Table) -> None:
        """What is looked at: HTML, JSON, and a table of all early evaluations."""
        self.write_text(PAGE, page)
        self.write_text(FIGURES, figures)
        with self.storage.writing(TABLE) as path:
            write_table(table, path)

    def starts(self) -> list[dict[str, Any]]:
        """Every start's versions, machine and settings that change no result."""
        try:
            return list(json.loads(self.storage.read(ENV)))
        except FileNotFoundError:
            return []
        except ValueError:
            raise UserError(f"{self.storage.at(ENV)}: is damaged. Delete it, and the same command goes on") from None

    def note_start(self, **facts: Any) -> None:
        """Add this start's versions, machine and `facts` to env.json."""
        packages = ("ray", "torch", "transformers", "numpy")
        own = {"python": platform.python_version(), "raymask": __version__}
        start = {
            "versions": own | {name: installed(name) for name in packages},
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            **facts,
        }
        self.write_text(ENV, json.dumps([*self.starts(), start], indent=1))

    def write_result(self, result: Result) -> None:
        self.write_text(RESULT, sealed(result, indent=1))

    def read_result(self) -> Result | None:
        """What a finished search found, or None while it is not."""
        try:
            return unsealed(Result, self.storage.read(RESULT))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            raise UserError(
                f"{self.storage.at(RESULT)}: is damaged. Delete it, and the same command writes it again"
            ) from None

    def has_export(self) -> bool:
        return self.storage.has(f"{EXPORT}/{MASK}")

    def write_spec(self, spec: Spec) -> None:
        self.write_text(SPEC, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False).rstrip())

    def read_spec(self) -> Spec:
        """The spec that this run was started with. Raises UserError when there is none."""
        try:
            return Spec.model_validate(yaml.safe_load(self.storage.read(SPEC)))
        except (FileNotFoundError, NotADirectoryError):
            something = any(True for _ in self.storage.names())
            what = f"it has no {SPEC}" if something else "nothing is there"
            raise UserError(f"{self.storage.at()}: is not a run directory: {what}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError):
            raise UserError(f"{self.storage.at(SPEC)}: is damaged; it must be the file that raymask wrote") from None


def branch(number: int) -> str:
    """The lineage of the search's branches, counted from 1."""
    return SEARCH if number == 1 else f"branch-{number}"


def branches(spec: Spec) -> list[str]:
    """The lineages of all branches that a search may have."""
    return [branch(number) for number in range(1, spec.select.keep + 1)]


def level_name(lineage: str, level: int) -> str:
    """The folder of a level of a lineage; the dense model has one level only."""
    return DENSE if lineage == DENSE else f"{lineage}/level-{level}" if lineage else f"level-{level}"


def check_run(store: RunDir, spec: Spec) -> None:
    """Raise UserError when other files, another driver, or finished work of another spec are there. Writes nothing."""
    storage = store.storage
    if not storage.has(SPEC) and any(True for _ in storage.names()):
        raise UserError(f"{storage.at()}: is not empty and not a run directory: choose another with --run")
    if storage.busy():
        raise UserError(f"{storage.at()}: another raymask is working in it; wait for it, or choose another with --run")
    if store.has_work():
        before, now = identity(store.read_spec()), identity(spec)
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if differing:
            lines = "".join(
                f"\n  - {key}: {json.dumps(before.get(key))} there, {json.dumps(now.get(key))} now" for key in differing
            )
            raise UserError(
                f"{storage.at()}: was started with another spec; choose another with --run, or undo:{lines}"
            )


@contextmanager
def open_run(store: RunDir, spec: Spec) -> Iterator[RunDir]:
    """The run directory, held by this process alone until the end; made when it is not there.

    Raises UserError as `check_run` does, and when the place cannot be written.
    """
    check_run(store, spec)
    with store.storage.held():
        if not store.has_work():
            store.write_spec(spec)
        yield store


def sealed(record: Record, indent: int | None = None) -> str:
    """A record as JSON whose last key is the SHA-256 of all before it: a flipped bit is still JSON."""
    body = record.model_dump_json(indent=indent)[:-1].rstrip()
    return f'{body},{"" if indent is None else chr(10) + " " * indent}"sha256":"{sha256_of(body.encode())}"}}'


def unsealed(kind: type[R], data: bytes) -> R:
    """The record. Raises ValueError when it is not what was written."""
    found = SEAL.fullmatch(data)
    if not found or sha256_of(found[1]) != found[2].decode():
        raise ValueError("damaged")
    return kind.model_validate_json(found[1] + b"}")


def flat_bits(packed: Packed) -> dict[str, Tensor]:
    """Packed mask bits as tensors for a file: uint8, with the shape beside each as int64."""
    found: dict[str, Tensor] = {}
    for name, (offset, size, shape, _) in packed.index.items():
        found[name] = from_numpy(packed.buffer[offset : offset + size])
        found[f"{name}:shape"] = from_numpy(np.array(shape, np.int64))
    return found


def packed_bits(tensors: Mapping[str, Tensor]) -> Packed:
    """The inverse of `flat_bits`."""
    names = [name for name in tensors if f"{name}:shape" in tensors]
    packed = vacant_bits({name: tuple(tensors[f"{name}:shape"].tolist()) for name in names})
    for name in names:
        offset, size, _, _ = packed.index[name]
        packed.buffer[offset : offset + size] = tensors[name].numpy()
    return packed


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file and return its SHA-256. Raises OSError."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {"format": "pt"}))
    except SafetensorError as error:
        raise OSError(str(error)) from None
    return sha256(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def installed(package: str) -> str:
    """A package's version; empty when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
