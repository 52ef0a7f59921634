"""Storage protocol of run directories, and what its implementations share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

from raymask.core.errors import UserError

T = TypeVar("T")

MessageFn = Callable[[str], None]
"""Receives a message for the user."""

PART = ".part"  # ending of files and folders that are being written; they are not part of a run
OBJECT_STORES = ("s3", "gcs", "abfs")  # the object stores that pyarrow.fs reaches itself
LOCK, CLAIMS, BEATS = "lock", "claims", "beats"  # lock file of a folder; claims and heartbeats in an object store


class Storage(Protocol):
    """Files of a run directory, in a local folder or an object store.

    Attributes:
        uri: The location, as the user gave it.
        option: The option of the command with which the user can choose another location, for messages; empty if the
            command has none.
    """

    uri: str
    option: str

    def at(self, name: str = "") -> str:
        """The location of a file or folder, for messages."""

    def names(self, under: str = "") -> Iterator[str]:
        """Names of all run files in a folder and its subfolders, in any order; none when the folder does not exist.

        Args:
            under: The folder; empty for the whole storage.
        """

    def size(self) -> int:
        """Bytes of all run files."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: There is no such file.
            UserError: It cannot be read.
        """

    def reading(self, name: str) -> AbstractContextManager[Path]:
        """A local file with the contents of `name`, for the block.

        Raises:
            FileNotFoundError: There is no such file.
            UserError: It cannot be read.
        """

    def reading_folder(self, name: str) -> AbstractContextManager[Path]:
        """A local folder with all files of the folder `name`, for the block."""

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local file to write in the block. It becomes `name` when the block ends without an error.

        Raises:
            UserError: It cannot be written.
        """

    def writing_folder(self, name: str) -> AbstractContextManager[Path]:
        """A local folder to write into. It replaces the folder `name` when the block ends without an error.

        Raises:
            UserError: It cannot be written.
        """

    def append(self, name: str, line: bytes) -> None:
        """Append a line to a file. An incomplete last line, left by a crash, is removed first.

        Args:
            name: The file, which need not exist.
            line: The line without its newline.

        Raises:
            UserError: It cannot be written.
        """

    def is_locked(self) -> bool:
        """Whether a live driver holds the lock."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold the lock for the block. A dead driver's lock does not count.

        Raises:
            UserError: Another driver holds the lock, or the storage cannot be written.
        """


@contextmanager
def temporary() -> Iterator[Path]:
    """A local temporary folder for the block.

    Raises:
        UserError: It cannot be written.
    """
    location = "the folder for temporary files"
    with translate_os_errors(location, "written", "TMPDIR"), TemporaryDirectory(prefix="raymask-") as folder:
        yield Path(folder)


@contextmanager
def translate_os_errors(location: str, done: str, option: str) -> Iterator[None]:
    """Turn an OSError in the block, such as a full disk or missing rights, into a UserError.

    Args:
        location: What is read or written, for the message.
        done: "written" or "read".
        option: The option or variable with which the user can choose another location; empty if there is none.

    Raises:
        UserError: The location cannot be read or written.
        FileNotFoundError: Only when reading: there is no such file.
        NotADirectoryError: Only when reading: a folder of the path is a file.
    """
    try:
        yield
    except OSError as error:
        if done == "read" and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
        reason = f"{error.strerror or error}{owner(error)}"
        raise UserError(f"{location}: cannot be {done}: {reason}. {storage_advice(option)}") from None


def storage_advice(option: str) -> str:
    """What the user can do when a location cannot be read or written.

    Args:
        option: The option or variable with which the user can choose another location; empty if there is none.
    """
    return "Fix this and run the same command again" + (f", or choose another location with {option}" if option else "")


def owner(error: OSError) -> str:
    """Whose file it is that may not be read or written, in parentheses; empty for all other errors."""
    if not isinstance(error, PermissionError) or not error.filename:
        return ""
    path = Path(os.fsdecode(error.filename))
    for existing in (path, *path.parents):
        with suppress(OSError, KeyError):  # it does not exist, or nobody has this user id
            return f" (it belongs to {existing.owner()})"
    return ""


def is_run_file(name: str) -> bool:
    """Whether a file is part of the run.

    Not part of the run are lock files, claims and heartbeats, incomplete files, and files whose name would lead out of
    a folder that they are copied to.

    Args:
        name: Path inside the storage.
    """
    parts = name.split("/")
    is_complete = not any(part in ("", ".", "..") or part.endswith(PART) for part in parts)
    return is_complete and parts[0] not in (LOCK, CLAIMS, BEATS)


def complete_lines(data: bytes) -> bytes:
    """The complete lines of a file. What follows the last newline was left incomplete by a crash."""
    return data[: data.rfind(b"\n") + 1]


def sync(path: Path) -> None:
    """Force a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
