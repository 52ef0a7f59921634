"""Layout of a run directory, and its reading and writing.

    <run>/spec.yaml env.json lock     the spec; versions per start, and its error; locked while a driver runs
          traceback.txt               of the last unexpected error
          dense/                      the fine-tuned dense model, laid out like a level
          level-N/evaluations.jsonl   the journal: one line per evaluation, appended as it arrives
                  mask.safetensors model.safetensors optimizer.safetensors test.safetensors
                  level.json          written last: its existence means that the level is done
          level-0/                    the dense model after dense distillation, if there is any
          branch-2/level-N/ ...       the same for the other branches, if more than one mask per level is kept
          imp/level-N/                the same for the IMP baseline
          export/ result.json
          report.html report.json     the report so far, for people and for programs
          results.parquet             one row per early evaluation

There is one writer, the driver. The layout is the same in a folder and in an object store. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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

from raymask.core.errors import TRACEBACK_NOTE, UserError, describe
from raymask.core.lineage import DENSE, IMP, SEARCH, branches
from raymask.core.masking.masks import empty_bits
from raymask.core.presets import fingerprint
from raymask.core.records import EvalKey, Evaluation, LevelRecord, Record, Result
from raymask.core.spec import NO_IMPORTS, Spec
from raymask.core.tasks import Checkpoint
from raymask.core.tensors import PackedTensors, pack
from raymask.machine import usable_cpus
from raymask.runs.open import open_storage
from raymask.runs.storage import MessageFn, Storage
from raymask.version import __version__

SPEC, ENV, RESULT, EXPORT = "spec.yaml", "env.json", "result.json", "export"

TRACEBACK = "traceback.txt"

REPORT_HTML, REPORT_JSON, TABLE = "report.html", "report.json", "results.parquet"

JOURNAL, LEVEL = "evaluations.jsonl", "level.json"

MASK, MODEL, OPTIMIZER, TEST_LOGITS = (
    "mask.safetensors",
    "model.safetensors",
    "optimizer.safetensors",
    "test.safetensors",
)

FORMAT = 2  # of a run directory: its file names and its records' fields; a change of either is another number
FORMAT_LINE = re.compile(rb"# raymask run directory, format (\d+)\n")

CHECKSUMMED = re.compile(rb'(.*),\s*"sha256":\s*"([0-9a-f]{64})"\s*}\s*', re.DOTALL)
"""A JSON object whose last key is `sha256`: the text before it, and the hash."""

R = TypeVar("R", bound=Record)


class RunDir:
    """A run directory. Only this class knows its file names.

    Attributes:
        note: Receives messages about outages.
        storage: The local folder or object store.
        levels: Records of finished levels that were read, by file name.
    """

    def __init__(self, location: str | Path, note: MessageFn = lambda text: None, option: str = "") -> None:
        """Open a run directory, which need not exist.

        Args:
            location: Path or URI.
            note: Receives messages about outages.
            option: The command's option that chooses another run directory, for messages; empty if it has none.

        Raises:
            UserError: There is no such storage.
        """
        self.note = note
        self.storage: Storage = open_storage(location, note, option)
        self.levels: dict[str, LevelRecord] = {}

    @property
    def uri(self) -> str:
        """The location, as the user gave it."""
        return self.storage.uri

    @property
    def export_uri(self) -> str:
        """The location of the exported model."""
        return self.storage.at(EXPORT)

    def has_progress(self) -> bool:
        """Whether there is finished work: a level's record, or a journal."""
        return any(name.rpartition("/")[2] in (LEVEL, JOURNAL) for name in self.storage.names())

    def downloadable_files(self) -> list[str]:
        """Names of all files except the tensors that only a resumed search needs; sorted."""
        names = self.storage.names()
        return sorted(name for name in names if name.startswith(EXPORT) or not name.endswith(".safetensors"))

    def parse(self, kind: type[R], content: bytes, damaged: str) -> R:
        """Parse a record with a checksum.

        Args:
            kind: Type of the record.
            content: What was read.
            damaged: Message about a damaged record.

        Raises:
            UserError: The run directory has another format, or the record is damaged.
        """
        try:
            return load_checksummed(kind, content)
        except ValueError:
            self.require_format()
            raise UserError(damaged) from None

    # --- the journal ---------------------------------------------------------------------------------------------

    def append(self, evaluation: Evaluation) -> None:
        """Append an evaluation to its level's journal. It survives a crash once this returns."""
        name = f"{level_name(SEARCH, evaluation.candidate.level)}/{JOURNAL}"
        self.storage.append(name, dump_checksummed(evaluation).encode())

    def evaluations(self, level: int) -> list[Evaluation]:
        """The evaluations in a level's journal; the last one where a key occurs twice.

        An incomplete last line is skipped: a killed driver leaves one.

        Raises:
            UserError: Any other line is damaged.
        """
        name = f"{level_name(SEARCH, level)}/{JOURNAL}"
        try:
            *lines, _incomplete = self.storage.read(name).split(b"\n")
        except FileNotFoundError:
            return []
        evaluations: dict[EvalKey, Evaluation] = {}
        for number, line in enumerate(lines, 1):
            damaged = f"{self.storage.at(name)}: line {number} is damaged. Delete the file to evaluate this level again"
            evaluation = self.parse(Evaluation, line, damaged)
            evaluations[evaluation.key] = evaluation
        return list(evaluations.values())

    # --- levels --------------------------------------------------------------------------------------------------

    def has_level(self, lineage: str, level: int) -> bool:
        """Whether a level of a lineage is done."""
        return self.storage.has(f"{level_name(lineage, level)}/{LEVEL}")

    def finished(self) -> list[tuple[str, LevelRecord]]:
        """Lineage and record of every finished level: the dense model first, then level by level."""
        spec = self.read_spec()
        levels = range(len(spec.levels.densities()) + 1)
        keys = [(DENSE, 0), *((lineage, level) for level in levels for lineage in (*branches(spec), IMP))]
        return [(lineage, self.read_level(lineage, level)) for lineage, level in keys if self.has_level(lineage, level)]

    def has_tensors(self, lineage: str, level: int, name: str) -> bool:
        """Whether a level's tensor file exists; a downloaded run has none.

        Args:
            lineage: The lineage.
            level: The level.
            name: File name, such as `MODEL`.
        """
        return self.storage.has(f"{level_name(lineage, level)}/{name}")

    def level_uri(self, lineage: str, level: int) -> str:
        """The location of a level's record."""
        return self.storage.at(f"{level_name(lineage, level)}/{LEVEL}")

    def read_level(self, lineage: str, level: int) -> LevelRecord:
        """The record of a finished level. It is read and checked once.

        Raises:
            FileNotFoundError: The level is not done.
            UserError: The record is damaged.
        """
        name = f"{level_name(lineage, level)}/{LEVEL}"
        if name not in self.levels:
            damaged = f"{self.storage.at(name)}: is damaged. Delete it to do this level again"
            self.levels[name] = self.parse(LevelRecord, self.storage.read(name), damaged)
        return self.levels[name]

    def write_level(self, lineage: str, level: int, checkpoint: Checkpoint, record: LevelRecord) -> LevelRecord:
        """Save a checkpoint, and last its record.

        Args:
            lineage: The lineage.
            level: The level.
            checkpoint: Weights, optimizer state, mask and predictions on `test`.
            record: The level's record, without hashes.

        Returns:
            The record with the files' SHA-256.
        """
        folder = level_name(lineage, level)
        tensors: dict[str, Mapping[str, Tensor]] = {
            MODEL: checkpoint.weights.views(),
            OPTIMIZER: checkpoint.optimizer.views(),
            MASK: bits_to_tensors(checkpoint.mask),
            TEST_LOGITS: {"logits": from_numpy(checkpoint.test_outputs)},
        }
        files = {}
        for name, content in tensors.items():
            with self.storage.writing(f"{folder}/{name}") as path:
                files[name] = write_tensors(path, content)
        done = record.model_copy(update={"files": files})
        self.write_text(f"{folder}/{LEVEL}", dump_checksummed(done, indent=1))
        self.levels.pop(f"{folder}/{LEVEL}", None)
        return done

    def read_tensors(self, lineage: str, level: int, name: str) -> dict[str, Tensor]:
        """Read a tensor file of a finished level and check its hash.

        Args:
            lineage: The lineage.
            level: The level.
            name: File name, such as `MODEL`.

        Raises:
            UserError: The file is missing, or it is not what was written.
        """
        file_name = f"{level_name(lineage, level)}/{name}"
        expected = self.read_level(lineage, level).files[name]
        advice = f"Delete {self.level_uri(lineage, level)} to do this level again"
        try:
            with self.storage.reading(file_name) as path:
                if sha256(path) != expected:
                    raise UserError(
                        f"{self.storage.at(file_name)}: is not what was written there (its hash differs). {advice}"
                    )
                return dict(load_file(path))
        except FileNotFoundError:
            raise UserError(f"{self.storage.at(file_name)}: is gone. {advice}") from None

    def read_weights(self, lineage: str, level: int) -> PackedTensors:
        """The weights of a finished level."""
        return pack(self.read_tensors(lineage, level, MODEL))

    def read_optimizer(self, lineage: str, level: int) -> PackedTensors:
        """The optimizer state of a finished level."""
        return pack(self.read_tensors(lineage, level, OPTIMIZER))

    def read_logits(self, lineage: str, level: int) -> np.ndarray:
        """What is stored of a finished level's predictions on `test`: float32 `[n_rows, n_outputs]`.

        Of a language model: each row's summed loss and its number of predicted tokens, float32 `[n_rows, 2]`.
        """
        return self.read_tensors(lineage, level, TEST_LOGITS)["logits"].numpy()

    # --- the run -------------------------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> None:
        """Write a text file; a newline is added at the end."""
        with self.storage.writing(name) as path:
            path.write_text(text + "\n", encoding="utf-8")

    def write_report(self, page: str, figures: str, table: Table) -> None:
        """Write the report.

        Args:
            page: The HTML page.
            figures: The report's numbers as JSON.
            table: One row per early evaluation.
        """
        self.write_text(REPORT_HTML, page)
        self.write_text(REPORT_JSON, figures)
        with self.storage.writing(TABLE) as path:
            write_table(table, path)

    def starts(self) -> list[dict[str, Any]]:
        """Versions, machine, and settings that change no result, of every start of the search.

        Raises:
            UserError: The file is damaged.
        """
        try:
            return list(json.loads(self.storage.read(ENV)))
        except FileNotFoundError:
            return []
        except ValueError:
            raise UserError(f"{self.storage.at(ENV)}: is damaged. Delete it, and the same command goes on") from None

    def record_start(self, **facts: Any) -> None:
        """Add a start to env.json: versions, machine and settings.

        Args:
            **facts: The settings, as JSON values.
        """
        packages = ("ray", "torch", "transformers", "numpy")
        versions = {"python": platform.python_version(), "raymask": __version__}
        start = {
            "versions": versions | {name: package_version(name) for name in packages},
            "machine": f"{platform.system()} {platform.machine()}, {usable_cpus()} CPUs",
            **facts,
        }
        self.write_text(ENV, json.dumps([*self.starts(), start], indent=1))

    def record_error(self, error: str) -> None:
        """Add the error that ended the last start to env.json."""
        starts = self.starts()
        if starts:  # none when the file was deleted during the search
            starts[-1]["error"] = error
            self.write_text(ENV, json.dumps(starts, indent=1))

    def write_traceback(self, text: str) -> str:
        """Write the traceback of the error that ended the last start, and return the file's location."""
        self.write_text(TRACEBACK, text)
        return self.storage.at(TRACEBACK)

    def write_result(self, result: Result) -> None:
        """Write the result. Its existence means that the search is done."""
        self.write_text(RESULT, dump_checksummed(result, indent=1))

    def read_result(self) -> Result | None:
        """The result of a finished search; None before that.

        Raises:
            UserError: The file is damaged.
        """
        damaged = f"{self.storage.at(RESULT)}: is damaged. Delete it, and `raymask search` writes it again"
        try:
            return self.parse(Result, self.storage.read(RESULT), damaged)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has_export(self) -> bool:
        """Whether the exported model is there."""
        return self.storage.has(f"{EXPORT}/{MASK}")

    def write_spec(self, spec: Spec) -> None:
        """Write the spec."""
        text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False).rstrip()
        self.write_text(SPEC, f"# raymask run directory, format {FORMAT}\n{text}")

    def require_format(self) -> None:
        """Check that this version of raymask reads the run directory, if it is one.

        Raises:
            UserError: It has another format.
        """
        try:
            line = FORMAT_LINE.match(self.storage.read(SPEC))
        except (OSError, NotADirectoryError):
            return
        number = int(line[1]) if line else 1  # the first format had no number
        if number != FORMAT:
            other = f", or choose another directory with {self.storage.option}" if self.storage.option else ""
            raise UserError(
                f"{self.storage.at()}: has run directory format {number}, and this raymask reads format {FORMAT}. "
                f"Use the version of raymask that wrote it (see env.json){other}"
            )

    def read_spec(self) -> Spec:
        """The spec that the run was started with.

        Raises:
            UserError: This is no run directory, it has another format, or the spec is damaged.
        """
        self.require_format()
        try:
            return Spec.model_validate(yaml.safe_load(self.storage.read(SPEC)), context=NO_IMPORTS)
        except (FileNotFoundError, NotADirectoryError):
            has_files = any(True for _ in self.storage.names())
            reason = f"it has no {SPEC}" if has_files else "nothing is there"
            raise UserError(f"{self.storage.at()}: is not a run directory: {reason}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError):
            raise UserError(f"{self.storage.at(SPEC)}: is damaged; it must be the file that raymask wrote") from None


def level_name(lineage: str, level: int) -> str:
    """The folder of a level of a lineage; the dense lineage has one level only, `dense`."""
    return DENSE if lineage == DENSE else f"{lineage}/level-{level}" if lineage else f"level-{level}"


def check_run(run_dir: RunDir, spec: Spec) -> None:
    """Check that a search of this spec can start or resume in a run directory. Writes nothing.

    Args:
        run_dir: The run directory.
        spec: The spec.

    Raises:
        UserError: Other files are there, another driver works there, or finished work belongs to another spec.
    """
    storage = run_dir.storage
    if not storage.has(SPEC) and any(True for _ in storage.names()):
        raise UserError(f"{storage.at()}: is not empty and not a run directory: choose another with --run")
    if storage.is_locked():
        raise UserError(f"{storage.at()}: another raymask is working in it; wait for it, or choose another with --run")
    if run_dir.has_progress():
        before, now = fingerprint(run_dir.read_spec()), fingerprint(spec)
        differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if differing:
            lines = "".join(
                f"\n  - {key}: {json.dumps(before.get(key))} there, {json.dumps(now.get(key))} now" for key in differing
            )
            raise UserError(
                f"{storage.at()}: was started with another spec; choose another with --run, or undo:{lines}"
            )


@contextmanager
def record_errors(run_dir: RunDir) -> Iterator[None]:
    """Write the error that ends the block into the run directory; of an unexpected one also the traceback.

    Args:
        run_dir: The run directory.
    """
    try:
        yield
    except Exception as error:
        with suppress(UserError):  # the error may be that nothing can be written
            if isinstance(error, UserError):
                run_dir.record_error(str(error))
            else:
                note = TRACEBACK_NOTE + run_dir.write_traceback("".join(traceback.format_exception(error)))
                error.add_note(note)
                run_dir.record_error(f"{describe(error)}. {note}")
        raise


@contextmanager
def open_run(run_dir: RunDir, spec: Spec) -> Iterator[RunDir]:
    """Lock a run directory for the block; create it if it does not exist.

    Args:
        run_dir: The run directory.
        spec: The spec.

    Yields:
        The run directory.

    Raises:
        UserError: As in `check_run`, or the storage cannot be written.
    """
    check_run(run_dir, spec)
    with run_dir.storage.lock():
        if not run_dir.has_progress():
            run_dir.write_spec(spec)
        yield run_dir


def dump_checksummed(record: Record, indent: int | None = None) -> str:
    """A record as JSON, with the SHA-256 of the preceding text as its last key.

    The hash is needed because JSON with a flipped bit can still be valid JSON.

    Args:
        record: The record.
        indent: Spaces per level of nesting; None for one line.
    """
    body = record.model_dump_json(indent=indent)[:-1].rstrip()
    return f'{body},{"" if indent is None else chr(10) + " " * indent}"sha256":"{sha256_of(body.encode())}"}}'


def load_checksummed(kind: type[R], data: bytes) -> R:
    """Read a record that `dump_checksummed` has written.

    Args:
        kind: Type of the record.
        data: The JSON text.

    Raises:
        ValueError: It is not what was written.
    """
    match = CHECKSUMMED.fullmatch(data)
    if not match or sha256_of(match[1]) != match[2].decode():
        raise ValueError("damaged")
    return kind.model_validate_json(match[1] + b"}")


def bits_to_tensors(packed: PackedTensors) -> dict[str, Tensor]:
    """Packed mask bits as tensors for a file.

    Returns:
        For every matrix `name` its packed bits, uint8 `[n_bytes]`, and as `name:shape` its shape, int64 `[2]`.
    """
    tensors: dict[str, Tensor] = {}
    for name, (offset, size, shape, _) in packed.index.items():
        tensors[name] = from_numpy(packed.buffer[offset : offset + size])
        tensors[f"{name}:shape"] = from_numpy(np.array(shape, np.int64))
    return tensors


def tensors_to_bits(tensors: Mapping[str, Tensor]) -> PackedTensors:
    """The inverse of `bits_to_tensors`."""
    names = [name for name in tensors if f"{name}:shape" in tensors]
    packed = empty_bits({name: tuple(tensors[f"{name}:shape"].tolist()) for name in names})
    for name in names:
        offset, size, _, _ = packed.index[name]
        packed.buffer[offset : offset + size] = tensors[name].numpy()
    return packed


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: The file's metadata; None for `{"format": "pt"}`.

    Returns:
        The file's SHA-256, as hexadecimal digits.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata or {"format": "pt"}))
    except SafetensorError as error:
        raise OSError(str(error)) from None
    return sha256(path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(data: bytes) -> str:
    """The SHA-256 of bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def package_version(package: str) -> str:
    """The version of a package; empty when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
