"""How are bytes kept: in a folder, or in an object store, which can neither append nor rename?

A name is a path inside the place, such as `level-1/level.json`. Either storage shows a file whole or not at all, and
is held by one driver at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

from raymask.core.errors import UserError, first_line

T = TypeVar("T")
Note = Callable[[str], None]
LOCK, CLAIMS, BEATS = "lock", "claims", "beats"  # how drivers hold a folder, and an object store
ONLOOKER = 10  # tenths of a second that a driver waits for one who only looks whether there is a driver
PART = ".part"  # what is being written ends so, and counts for nothing
OUTAGE = 120.0  # seconds for which a storage may answer with errors before a search gives up
GOOGLE = 5.0  # seconds for which Google's client tries again by itself
BEAT = 5.0  # seconds between two signs of life of a driver
LOOKS = 15  # looks, a second apart, without a sign of life after which a driver counts as dead
OBJECT_STORES = ("s3", "gcs", "abfs")
PERMANENT = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|CREDENTIALS|EXPIRED|ExpiredToken|PERMISSION|"
    r"HTTP status 301|HTTP status 400\) during Head"
)
"""How storages say so when trying again is of no use."""
SECRET = re.compile(r"://[^@]*:(?!\d+/)[^@]*@|[?&][^=&]*(key|secret|password|token|sig)[^=&]*=", re.IGNORECASE)
"""A password before a host, which may contain slashes though it must not, or one among the options."""


class Storage(Protocol):
    """What a run directory needs of the place that it lies in."""

    uri: str

    def at(self, name: str = "") -> str:
        """The place of a name, for people."""

    def names(self, under: str = "") -> Iterator[str]:
        """Every file's name, or of those in a folder `under` it, in any order; none when that does not exist."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def reading(self, name: str) -> AbstractContextManager[Path]:
        """A local file with the contents. Raises FileNotFoundError."""

    def reading_folder(self, name: str) -> AbstractContextManager[Path]:
        """A local folder with all files of a folder."""

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local file to write, which gets its name when the block ends well."""

    def writing_folder(self, name: str) -> AbstractContextManager[Path]:
        """A local folder to write into, whose files get their names when the block ends well."""

    def append(self, name: str, line: bytes) -> None:
        """Add a line; a torn one at the end, from an earlier crash, is cut first."""

    def busy(self) -> bool:
        """Whether a driver holds the place now."""

    def held(self) -> AbstractContextManager[None]:
        """Hold the place until the block ends. Raises UserError when another driver does, and when it cannot be
        written; a dead driver's hold does not count.
        """


def open_storage(place: str | Path, note: Note = lambda text: None) -> Storage:
    """A local path, or a URI of anything that pyarrow.fs or fsspec reaches. `note` is told of outages.

    Raises UserError when there is no such storage, or when the URI carries a password: it would end up in logs.
    """
    uri = str(place)
    require_no_secret(uri)
    if "://" not in uri:
        path = Path(os.path.expanduser(uri))  # a job's command line goes through no shell
        if path.is_file():
            raise UserError(f"{path}: is a file, and a run directory is a folder")
        return Folder(path)
    import fsspec
    from pyarrow import ArrowException, fs

    try:
        try:
            filesystem, root = fs.FileSystem.from_uri(bounded(uri))
        except ArrowException as error:
            if "Unrecognized filesystem" not in str(error):
                raise
            other, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)  # another driver's claim is news
            filesystem = fs.PyFileSystem(fs.FSSpecHandler(other))
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(f"{uri}: cannot be reached: {first_line(error)}") from None
    if filesystem.type_name in OBJECT_STORES and not root:
        raise UserError(f"{uri}: names no bucket")
    return Folder(Path(root)) if filesystem.type_name == "local" else Bucket(uri, filesystem, root.rstrip("/"), note)


def require_no_secret(uri: str) -> None:
    """Raise UserError when a URI carries a password."""
    scheme = uri.partition("://")[0]
    if "://" in uri and SECRET.search(uri):
        raise UserError(
            f"{scheme}://***: credentials do not belong in a URI, which is logged: put them where {scheme} looks for "
            "them (environment variables, a credentials file, the machine's role)"
        )


class Folder:
    """A local folder, also on NFS: files are written beside their place and renamed."""

    def __init__(self, path: Path, option: str = "--run") -> None:
        """`option`: by which another place can be chosen."""
        self.path = path
        self.uri = str(path)
        self.option = option

    def at(self, name: str = "") -> str:
        return str(self.path / name)

    def names(self, under: str = "") -> Iterator[str]:
        for folder, _, files in os.walk(self.path / under):
            for file in files:
                name = (Path(folder) / file).relative_to(self.path).as_posix()
                if counts(name):
                    yield name

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        with complaining(self.at(name), "read"):
            return (self.path / name).read_bytes()

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        with complaining(self.at(name), "read"):
            yield self.path / name

    @contextmanager
    def reading_folder(self, name: str) -> Iterator[Path]:
        yield self.path / name

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        path = self.path / name
        beside = path.with_name(path.name + PART)
        with complaining(self.at(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield beside
                sync(beside)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
            sync(path.parent)  # the name itself

    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        path = self.path / name
        beside = path.with_name(path.name + PART)
        with complaining(self.at(name), option=self.option):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            try:
                yield beside
                for inner in Folder(beside).names():
                    sync(beside / inner)
                shutil.rmtree(path, ignore_errors=True)
                beside.rename(path)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    def append(self, name: str, line: bytes) -> None:
        path = self.path / name
        with complaining(self.at(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                old = file.read()
                if len(whole := whole_lines(old)) < len(old):
                    file.truncate(len(whole))
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def busy(self) -> bool:
        if not (self.path / LOCK).exists():
            return False
        with (self.path / LOCK).open() as lock:
            return not self.lock(lock, fcntl.LOCK_SH)  # all that NFS gives to those who only read

    @contextmanager
    def held(self) -> Iterator[None]:
        with complaining(self.at()):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a+")
        with lock:
            for _ in range(ONLOOKER):
                if self.lock(lock, fcntl.LOCK_EX):
                    break
                time.sleep(0.1)
            else:
                raise UserError(f"{self.path}: another raymask has just started in it; wait for it")
            yield

    def lock(self, file: Any, kind: int) -> bool:
        """Take the kernel's lock, which ends with the process; false when another has it."""
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise UserError(
                f"{self.path}: its file system has no locks ({error.strerror}), so that two drivers could work in it "
                "at once: choose another with --run"
            ) from None
        return True


class Bucket:
    """Anything else: an object is put whole, and nothing is ever renamed.

    A driver holds it by an object of its own below `claims/`, and writes one below `beats/` anew every few seconds.
    Whoever comes later does so too, then watches those that were there before: a beat that changes belongs to a living
    driver. So of two that come at once none goes on unless it has seen the other give way; no clock is compared with
    another's. The claim of a driver that is held for dead is removed. It never comes back, and without it nothing is
    written: should the driver wake up, it finds that it has lost the place.
    """

    def __init__(self, uri: str, filesystem: Any, root: str, note: Note) -> None:
        self.uri = uri
        self.filesystem = filesystem
        self.root = root
        self.note = note
        self.base = uri.partition("?")[0].rstrip("/")
        own = filesystem.type_name in OBJECT_STORES  # pyarrow's; everything behind fsspec has errors of its own
        self.errors: tuple[type[Exception], ...] = (OSError, ValueError, NotImplementedError) if own else (Exception,)
        self.mine = ""  # this driver's claim, while it holds the place
        self.dead: dict[str, bytes] = {}

    def at(self, name: str = "") -> str:
        return f"{self.base}/{name}" if name else self.base

    def names(self, under: str = "") -> Iterator[str]:
        return filter(counts, self.listed(under))

    def listed(self, under: str = "") -> list[str]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(f"{self.root}/{under}".rstrip("/"), allow_not_found=True, recursive=True)
        infos = self.patiently("read", lambda: self.filesystem.get_file_info(selector))
        return [info.path.removeprefix(f"{self.root}/") for info in infos if info.is_file]

    def has(self, name: str) -> bool:
        return bool(self.patiently("read", lambda: self.filesystem.get_file_info(f"{self.root}/{name}").is_file))

    def read(self, name: str) -> bytes:
        def get() -> bytes:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
                return bytes(stream.read())

        return self.patiently("read", get)

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        def get() -> None:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream, path.open("wb") as file:
                shutil.copyfileobj(stream, file)

        with TemporaryDirectory(prefix="raymask-") as folder:
            path = Path(folder) / Path(name).name
            self.patiently("read", get)
            yield path

    @contextmanager
    def reading_folder(self, name: str) -> Iterator[Path]:
        with temporary() as folder:
            copy = Folder(folder)
            for inner in self.names(name):
                with self.reading(inner) as source, copy.writing(inner) as path:
                    shutil.move(source, path)
            yield folder / name

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with temporary() as folder:
            path = folder / Path(name).name
            yield path
            self.put(name, path)

    @contextmanager
    def writing_folder(self, name: str) -> Iterator[Path]:
        with temporary() as folder:
            yield folder
            written = {f"{name}/{inner}": folder / inner for inner in Folder(folder).names()}
            for inner, path in written.items():
                self.put(inner, path)
            for other in set(self.names(name)) - written.keys():  # of what was there before
                self.patiently("written", partial(self.filesystem.delete_file, f"{self.root}/{other}"))

    def append(self, name: str, line: bytes) -> None:
        old = b""
        with suppress(FileNotFoundError):
            old = self.read(name)
        with self.writing(name) as path:
            path.write_bytes(whole_lines(old) + line + b"\n")

    def put(self, name: str, path: Path) -> None:
        """Store a local file under a name, unless this driver has lost the place."""
        if self.mine and not self.has(self.mine):
            raise UserError(f"{self.base}: another raymask has taken it over, since this one gave no sign of life")
        self.patiently("written", lambda: self.send(name, path))

    def send(self, name: str, path: Path) -> None:
        """In one call, which Ctrl-C waits for: a stream that Python leaves early would store what it has so far."""
        from pyarrow.fs import LocalFileSystem, copy_files

        if self.filesystem.type_name not in OBJECT_STORES:  # which know no folders
            self.filesystem.create_dir(f"{self.root}/{name}".rpartition("/")[0], recursive=True)
        copy_files(str(path), f"{self.root}/{name}", LocalFileSystem(), self.filesystem)

    def patiently(self, done: str, action: Callable[[], T]) -> T:
        """The action's result, which is tried again while the storage answers with errors."""
        started, pause = time.monotonic(), 0.5
        while True:
            try:
                return action()
            except self.errors as error:
                if isinstance(error, FileNotFoundError) and done == "read":
                    raise
                if hopeless(error) or time.monotonic() - started > OUTAGE:
                    raise UserError(
                        f"{self.base}: cannot be {done}: {first_line(error)}. Mend that and the same command goes on "
                        "from here, or choose another place with --run"
                    ) from None
                self.note(f"{self.base} answers with an error, trying again: {first_line(error)}")
            time.sleep(pause)
            pause = min(2 * pause, 10.0)

    def busy(self) -> bool:
        return bool(self.living())

    @contextmanager
    def held(self) -> Iterator[None]:
        driver, ended = uuid.uuid4().hex, threading.Event()
        for folder in (BEATS, CLAIMS):
            with self.writing(f"{folder}/{driver}") as path:
                path.write_text("0")
        self.mine = f"{CLAIMS}/{driver}"
        pulse = threading.Thread(target=self.beat, args=(driver, ended), daemon=True)
        pulse.start()
        try:
            if self.living():
                raise UserError(f"{self.base}: another raymask is working in it; wait for it, or choose another")
            for name in self.dead:
                self.patiently("written", partial(self.remove, name))
            yield
        finally:
            ended.set()
            pulse.join()
            self.mine = ""
            with suppress(*self.errors):  # left behind, it counts as dead soon
                self.remove(driver)

    def beat(self, driver: str, ended: threading.Event) -> None:
        """Give signs of life, until the end or until the claim is gone."""
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with suppress(*self.errors):  # an outage: the next beat tries again
                if not self.filesystem.get_file_info(f"{self.root}/{CLAIMS}/{driver}").is_file:
                    return
                with self.filesystem.open_output_stream(f"{self.root}/{BEATS}/{driver}") as stream:
                    stream.write(str(count).encode())

    def remove(self, driver: str) -> None:
        """Its claim first: a beat without one counts for nothing."""
        for folder in (CLAIMS, BEATS):
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(f"{self.root}/{folder}/{driver}")

    def living(self) -> list[str]:
        """Other drivers whose beats change while we look. Looks are counted, not seconds: an outage proves no death."""
        watched = {driver: beat for driver, beat in self.beats().items() if self.dead.get(driver) != beat}
        if watched:
            self.note(f"{self.base} is held by another driver: looking for {LOOKS} s whether it is alive")
        for _ in range(LOOKS):
            if not watched:
                return []
            time.sleep(1.0)
            now = self.beats()
            changed = [driver for driver, beat in watched.items() if now.get(driver, beat) != beat]
            if changed:
                return changed
            watched = {driver: beat for driver, beat in watched.items() if driver in now}
        self.dead |= watched
        return []

    def beats(self) -> dict[str, bytes]:
        """Last signs of life of all other drivers that have a claim."""
        found = {}
        for name in self.listed(CLAIMS):
            if name != self.mine:
                driver = name.removeprefix(f"{CLAIMS}/")
                with suppress(FileNotFoundError):  # it gave way in between
                    found[driver] = self.read(f"{BEATS}/{driver}")
        return found


@contextmanager
def temporary() -> Iterator[Path]:
    """A local folder to write into, gone at the end of the block."""
    place = "the folder for temporary files"
    with complaining(place, option="TMPDIR"), TemporaryDirectory(prefix="raymask-") as folder:
        yield Path(folder)


@contextmanager
def complaining(place: str, done: str = "written", *, option: str = "--run") -> Iterator[None]:
    """Say that a place cannot be written, be the disk full or not ours to write, or not be read though it is there."""
    try:
        yield
    except OSError as error:
        if done == "read" and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
        raise UserError(
            f"{place}: cannot be {done}: {error.strerror or error}. Mend that and the same command goes on from here, "
            f"or choose another place with {option}"
        ) from None


def counts(name: str) -> bool:
    """Whether a file is the run's own: neither a driver's hold on it, of either storage, nor half-written.

    Nor one whose name would lead out of a folder that it is copied to.
    """
    parts = name.split("/")
    whole = not any(part in ("", ".", "..") or part.endswith(PART) for part in parts)
    return whole and parts[0] not in (LOCK, CLAIMS, BEATS)


def hopeless(error: Exception) -> bool:
    """Whether trying again is of no use."""
    kinds = (FileNotFoundError, PermissionError, NotImplementedError)
    local = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return local or isinstance(error, kinds) or bool(PERMANENT.search(str(error)))


def bounded(uri: str) -> str:
    """Google's client tries for a quarter of an hour, without a word, if it isn't told: to be patient is our part."""
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={GOOGLE:g}"


def whole_lines(data: bytes) -> bytes:
    """Everything up to the last end of a line: what follows was torn by a crash."""
    return data[: data.rfind(b"\n") + 1]


def sync(path: Path) -> None:
    """Force a file, or a folder's names, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
