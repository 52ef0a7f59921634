"""Storage in a local folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raymask.core.errors import UserError
from raymask.runs.storage import LOCK, PART, complete_lines, is_run_file, storage_advice, sync, translate_os_errors

LOCK_ATTEMPTS = 10  # 0.1 s apart; `is_locked` in another process holds a shared lock for a moment


class LocalStorage:
    """A local folder, also on NFS. Files are written beside their final path and renamed.

    Attributes:
        path: The folder.
        uri: The folder as text.
        option: The command's option that chooses another folder, for messages; empty if it has none.
    """

    def __init__(self, path: Path, option: str = "") -> None:
        """Open a folder, which need not exist.

        Args:
            path: The folder.
            option: The command's option that chooses another folder, for messages; empty if it has none.
        """
        self.path = path
        self.uri = str(path)
        self.option = option

    def at(self, name: str = "") -> str:
        """The path of a file or folder, for messages."""
        return str(self.path / name)

    def names(self, under: str = "") -> Iterator[str]:
        """Names of all run files below a folder; see `Storage.names`."""
        for folder, _, files in os.walk(self.path / under):
            for file in files:
                name = (Path(folder) / file).relative_to(self.path).as_posix()
                if is_run_file(name):
                    yield name

    def size(self) -> int:
        """Bytes of all run files."""
        return sum((self.path / name).stat().st_size for name in self.names())

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        with translate_os_errors(self.at(name), "read", self.option):
            return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        """Read a file; see `Storage.read`."""
        with translate_os_errors(self.at(name), "read", self.option):
            return (self.path / name).read_bytes()

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """The file itself."""
        with translate_os_errors(self.at(name), "read", self.option):
            yield self.path / name

    @contextmanager
    def reading_folder(self, name: str) -> Iterator[Path]:
        """The folder itself."""
        yield self.path / name

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file beside `name`, which is renamed to `name` when the block ends without an error."""
        path = self.path / name
        beside = path.with_name(path.name + PART)
        with translate_os_errors(self.at(name), "written", self.option):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield beside
                sync(beside)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
            sync(path.parent)  # makes the rename durable

    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        """A folder beside `name`, which replaces `name` when the block ends without an error."""
        path = self.path / name
        beside = path.with_name(path.name + PART)
        with translate_os_errors(self.at(name), "written", self.option):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            try:
                yield beside
                for inner in LocalStorage(beside).names():
                    sync(beside / inner)
                shutil.rmtree(path, ignore_errors=True)
                beside.rename(path)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    def append(self, name: str, line: bytes) -> None:
        """Append a line; see `Storage.append`."""
        path = self.path / name
        with translate_os_errors(self.at(name), "written", self.option):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                content = file.read()
                if len(complete := complete_lines(content)) < len(content):
                    file.truncate(len(complete))
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def is_locked(self) -> bool:
        """Whether a live driver holds the lock."""
        if not self.has(LOCK):
            return False
        with translate_os_errors(self.at(LOCK), "read", self.option), (self.path / LOCK).open() as lock:
            return not self.try_flock(lock, fcntl.LOCK_SH)  # NFS gives no exclusive lock on a file opened for reading

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the kernel's lock on the lock file for the block; see `Storage.lock`."""
        with translate_os_errors(self.at(), "written", self.option):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a+")
        with lock:
            for _ in range(LOCK_ATTEMPTS):
                if self.try_flock(lock, fcntl.LOCK_EX):
                    break
                time.sleep(0.1)
            else:
                raise UserError(f"{self.path}: another raymask has just started in it; wait for it")
            yield

    def try_flock(self, file: Any, kind: int) -> bool:
        """Try to take the kernel's lock on a file. The lock ends with the process.

        Args:
            file: The open file.
            kind: `fcntl.LOCK_SH` or `fcntl.LOCK_EX`.

        Returns:
            Whether the lock was taken; False when another process holds it.

        Raises:
            UserError: The file system has no locks.
        """
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise UserError(
                f"{self.path}: its file system has no locks ({error.strerror}), so that two drivers could work in it "
                f"at once. {storage_advice(self.option)}"
            ) from None
        return True
