"""Storage in an object store."""

from __future__ import annotations

import errno
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raymask.core.errors import UserError, first_line
from raymask.runs.local_storage import LocalStorage
from raymask.runs.storage import (
    BEATS,
    CLAIMS,
    OBJECT_STORES,
    MessageFn,
    T,
    complete_lines,
    is_run_file,
    storage_advice,
    temporary,
)

MAX_OUTAGE_S = 120.0  # seconds for which a request is retried while the storage answers with errors

GCS_RETRY_S = 5.0  # seconds for which Google's client retries by itself

HEARTBEAT_INTERVAL_S = 5.0  # seconds between two heartbeats of a driver

MAX_HEARTBEAT_POLLS = 15  # polls, a second apart, without a new heartbeat after which a driver counts as dead

PERMANENT = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|CREDENTIALS|EXPIRED|ExpiredToken|PERMISSION|"
    r"HTTP status 301|HTTP status 400\) during Head"
)
"""Error texts of object stores for which a retry is of no use."""


class ObjectStorage:
    """An object store. Objects are written whole and never renamed.

    Lock protocol: write a claim below `claims/` and a heartbeat below `beats/`, rewrite the heartbeat every `BEAT`
    seconds, and poll every other claim's heartbeat up to `LOOKS` times. A claim whose heartbeat changes is live: give
    up. Otherwise the claim is dead: delete it. Of two drivers that start at the same time, one goes on only after it
    has seen the other give up. Before every write the owner checks that its own claim still exists, so a driver that
    was taken for dead and wakes up writes nothing. A deleted claim is never written again. Clocks are never compared.

    Attributes:
        uri: The URI, as the user gave it.
        filesystem: The pyarrow file system.
        root: Path in the file system.
        note: Receives messages about outages and locks.
        base: The URI without its options.
        errors: Exception types that the file system raises for failed requests.
        option: The command's option that chooses another location, for messages; empty if it has none.
        mine: Name of this driver's claim while it holds the lock; else empty.
        dead: Last heartbeat of the drivers taken for dead, by driver.
    """

    def __init__(self, uri: str, filesystem: Any, root: str, note: MessageFn, option: str = "") -> None:
        """Open a location, which need not exist.

        Args:
            uri: The URI.
            filesystem: A pyarrow file system.
            root: Path in the file system.
            note: Receives messages about outages and locks.
            option: The command's option that chooses another location, for messages; empty if it has none.
        """
        self.uri = uri
        self.option = option
        self.filesystem = filesystem
        self.root = root
        self.note = note
        self.base = uri.partition("?")[0].rstrip("/")
        is_native = filesystem.type_name in OBJECT_STORES  # fsspec's file systems raise errors of any type
        errors = (OSError, ValueError, NotImplementedError) if is_native else (Exception,)
        self.errors: tuple[type[Exception], ...] = errors
        self.mine = ""
        self.dead: dict[str, bytes] = {}

    def at(self, name: str = "") -> str:
        """The URI of a file or folder, for messages."""
        return f"{self.base}/{name}" if name else self.base

    def names(self, under: str = "") -> Iterator[str]:
        """Names of all run files below a folder; see `Storage.names`."""
        return filter(is_run_file, self.list_all(under))

    def size(self) -> int:
        """Bytes of all run files."""
        return sum(size for name, size in self.sizes().items() if is_run_file(name))

    def list_all(self, under: str = "") -> list[str]:
        """Names of all files below a folder, claims and heartbeats included."""
        return list(self.sizes(under))

    def sizes(self, under: str = "") -> dict[str, int]:
        """Bytes of all files below a folder by name, claims and heartbeats included."""
        from pyarrow.fs import FileSelector

        selector = FileSelector(f"{self.root}/{under}".rstrip("/"), allow_not_found=True, recursive=True)
        infos = self.with_retries("read", lambda: self.filesystem.get_file_info(selector))
        return {info.path.removeprefix(f"{self.root}/"): info.size or 0 for info in infos if info.is_file}

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return bool(self.with_retries("read", lambda: self.filesystem.get_file_info(f"{self.root}/{name}").is_file))

    def read(self, name: str) -> bytes:
        """Read a file; see `Storage.read`."""

        def get() -> bytes:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
                return bytes(stream.read())

        return self.with_retries("read", get)

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A temporary local copy of the file."""

        def get() -> None:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream, path.open("wb") as file:
                shutil.copyfileobj(stream, file)

        with TemporaryDirectory(prefix="raymask-") as folder:
            path = Path(folder) / Path(name).name
            self.with_retries("read", get)
            yield path

    @contextmanager
    def reading_folder(self, name: str) -> Iterator[Path]:
        """A temporary local copy of the folder."""
        with temporary() as folder:
            copy = LocalStorage(folder)
            for inner in self.names(name):
                with self.reading(inner) as source, copy.writing(inner) as path:
                    shutil.move(source, path)
            yield folder / name

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary local file, which is uploaded as `name` when the block ends without an error."""
        with temporary() as folder:
            path = folder / Path(name).name
            yield path
            self.upload(name, path)

    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        """A temporary local folder, which is uploaded as `name` when the block ends without an error."""
        with temporary() as folder:
            yield folder
            written = {f"{name}/{inner}": folder / inner for inner in LocalStorage(folder).names()}
            for inner, path in written.items():
                self.upload(inner, path)
            for stale in set(self.names(name)) - written.keys():  # files of the folder that is replaced
                self.with_retries("written", partial(self.filesystem.delete_file, f"{self.root}/{stale}"))

    def append(self, name: str, line: bytes) -> None:
        """Append a line by writing the whole file again; see `Storage.append`."""
        content = b""
        with suppress(FileNotFoundError):
            content = self.read(name)
        with self.writing(name) as path:
            path.write_bytes(complete_lines(content) + line + b"\n")

    def upload(self, name: str, path: Path) -> None:
        """Upload a local file.

        Args:
            name: Its name in the storage.
            path: The local file.

        Raises:
            UserError: Another driver has taken the lock over, or the storage cannot be written.
        """
        if self.mine and not self.has(self.mine):
            raise UserError(f"{self.base}: another raymask has taken it over, since this one sent no heartbeat")
        self.with_retries("written", lambda: self.upload_once(name, path))

    def upload_once(self, name: str, path: Path) -> None:
        """Upload a local file once, without retries.

        It is one call, for which Ctrl-C waits. A stream that Python closes early would store an incomplete object.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        if self.filesystem.type_name not in OBJECT_STORES:  # object stores have no folders to create
            self.filesystem.create_dir(f"{self.root}/{name}".rpartition("/")[0], recursive=True)
        copy_files(str(path), f"{self.root}/{name}", LocalFileSystem(), self.filesystem)

    def with_retries(self, done: str, action: Callable[[], T]) -> T:
        """Run a request, and retry it while the storage answers with errors.

        Args:
            done: "read" or "written", for the message.
            action: The request.

        Returns:
            The request's result.

        Raises:
            UserError: The error is permanent, or it lasted `OUTAGE` seconds.
            FileNotFoundError: Only when reading: there is no such file.
        """
        started, pause = time.monotonic(), 0.5
        while True:
            try:
                return action()
            except self.errors as error:
                if isinstance(error, FileNotFoundError) and done == "read":
                    raise
                if is_permanent(error) or time.monotonic() - started > MAX_OUTAGE_S:
                    raise UserError(
                        f"{self.base}: cannot be {done}: {first_line(error)}. {storage_advice(self.option)}"
                    ) from None
                self.note(f"{self.base} answers with an error, trying again: {first_line(error)}")
            time.sleep(pause)
            pause = min(2 * pause, 10.0)

    def is_locked(self) -> bool:
        """Whether a live driver holds the lock. Takes up to `LOOKS` seconds when there is a claim."""
        return bool(self.live_holders())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold a claim with a heartbeat for the block; see the class and `Storage.lock`."""
        driver, ended = uuid.uuid4().hex, threading.Event()
        for folder in (BEATS, CLAIMS):
            with self.writing(f"{folder}/{driver}") as path:
                path.write_text("0")
        self.mine = f"{CLAIMS}/{driver}"
        heartbeat = threading.Thread(target=self.heartbeat, args=(driver, ended), daemon=True)
        heartbeat.start()
        try:
            if self.live_holders():
                raise UserError(f"{self.base}: another raymask is working in it; wait for it, or choose another")
            for name in self.dead:
                self.with_retries("written", partial(self.remove_claim, name))
            yield
        finally:
            ended.set()
            heartbeat.join()
            self.mine = ""
            with suppress(*self.errors):  # a claim that stays behind counts as dead without its heartbeat
                self.remove_claim(driver)

    def heartbeat(self, driver: str, ended: threading.Event) -> None:
        """Write heartbeats until `ended` is set or the driver's claim is gone."""
        count = 0
        while not ended.wait(HEARTBEAT_INTERVAL_S):
            count += 1
            with suppress(*self.errors):  # during an outage the next heartbeat tries again
                if not self.filesystem.get_file_info(f"{self.root}/{CLAIMS}/{driver}").is_file:
                    return
                with self.filesystem.open_output_stream(f"{self.root}/{BEATS}/{driver}") as stream:
                    stream.write(str(count).encode())

    def remove_claim(self, driver: str) -> None:
        """Delete a driver's claim, then its heartbeat: a heartbeat without a claim counts for nothing."""
        for folder in (CLAIMS, BEATS):
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(f"{self.root}/{folder}/{driver}")

    def live_holders(self) -> list[str]:
        """Other drivers whose heartbeat changes within `LOOKS` polls; drivers without a change are added to `dead`.

        Polls are counted, not seconds, because an outage does not prove that a driver is dead.
        """
        unchanged = {driver: beat for driver, beat in self.heartbeats().items() if self.dead.get(driver) != beat}
        if unchanged:
            self.note(
                f"{self.base} is held by another driver: checking for {MAX_HEARTBEAT_POLLS} s whether it is alive"
            )
        for _ in range(MAX_HEARTBEAT_POLLS):
            if not unchanged:
                return []
            time.sleep(1.0)
            heartbeats = self.heartbeats()
            live = [driver for driver, beat in unchanged.items() if heartbeats.get(driver, beat) != beat]
            if live:
                return live
            unchanged = {driver: beat for driver, beat in unchanged.items() if driver in heartbeats}
        self.dead |= unchanged
        return []

    def heartbeats(self) -> dict[str, bytes]:
        """Contents of the last heartbeat of every other driver that has a claim, by driver."""
        heartbeats = {}
        for name in self.list_all(CLAIMS):
            if name != self.mine:
                driver = name.removeprefix(f"{CLAIMS}/")
                with suppress(FileNotFoundError):  # the driver gave up in between
                    heartbeats[driver] = self.read(f"{BEATS}/{driver}")
        return heartbeats


def is_permanent(error: Exception) -> bool:
    """Whether a retry is of no use: missing files or rights, wrong credentials, a full or read-only disk."""
    permanent_types = (FileNotFoundError, PermissionError, NotImplementedError)
    is_disk_error = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return is_disk_error or isinstance(error, permanent_types) or bool(PERMANENT.search(str(error)))


def limit_gcs_retries(uri: str) -> str:
    """Limit the retries of Google's client, which by default retries silently for 15 minutes.

    `ObjectStorage.with_retries` does the retries instead, with messages.

    Args:
        uri: Any URI.

    Returns:
        The URI; with the option `retry_limit_seconds` if it is a Google URI that has none.
    """
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_RETRY_S:g}"
