"""Contract tests of storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raymask.core.errors import UserError
from raymask.runs.storage import Storage
from raymask.testing.require import require

PART_BYTES = 12 * 2**20  # more than one part of an upload to an object store


class BlockError(Exception):
    """What a check raises inside a block, as an error of the caller would."""


def check_storage(open_storage: Callable[[], Storage]) -> None:
    """Check a storage. It is filled and not emptied again. An object store takes seconds to see a lock.

    Args:
        open_storage: Opens the same location at every call, as another process would. It is empty at first.

    Raises:
        AssertionError: A rule is broken.
    """
    check_empty(open_storage())
    check_files(open_storage)
    check_large_file(open_storage)
    check_folders(open_storage)
    check_interrupted(open_storage)
    check_append(open_storage)
    check_lock(open_storage)


def write(storage: Storage, name: str, data: bytes) -> None:
    """Write a file."""
    with storage.writing(name) as path:
        path.write_bytes(data)


def check_empty(storage: Storage) -> None:
    """Check a location where nothing is."""
    require(not list(storage.names()), "names() of a location that does not exist must be empty")
    require(not storage.has("a/b"), 'has("a/b") must be False where no such file is')
    require(not storage.is_locked(), "is_locked() must be False where no driver is")
    for method in ("read", "reading"):
        try:
            if method == "read":
                storage.read("a/b")
            else:
                with storage.reading("a/b") as path:
                    path.read_bytes()
        except FileNotFoundError:
            continue
        require(False, f'{method}("a/b") must raise FileNotFoundError where no such file is')
    require(not list(storage.names()), "Reading must create no file: names() is not empty after it")


def check_files(open_storage: Callable[[], Storage]) -> None:
    """Check that a file appears under its name, is replaced as a whole, and is seen by others at once."""
    storage, other = open_storage(), open_storage()
    for data in (b"a longer one", b"short", b""):
        before = other.read("level-1/a.bin") if other.has("level-1/a.bin") else None
        with storage.writing("level-1/a.bin") as path:
            path.write_bytes(data)
            seen = other.read("level-1/a.bin") if other.has("level-1/a.bin") else None
            require(seen == before, "A file must not change before the block of writing() ends")
        require(other.has("level-1/a.bin"), "has() must be True for a file once the block of writing() has ended")
        require(other.read("level-1/a.bin") == data, f"read() must give what was written last, {data!r}")
        with other.reading("level-1/a.bin") as path:
            require(path.read_bytes() == data, f"reading() must give what was written last, {data!r}")
    write(storage, "level-10/b.bin", b"b")
    require(sorted(other.names()) == ["level-1/a.bin", "level-10/b.bin"], "names() must give all files once")
    require(list(other.names("level-1")) == ["level-1/a.bin"], 'names("level-1") must give that folder\'s files alone')
    require(not other.has("level-1"), "has() must be False for a folder")
    require("level-1/a.bin" in other.at("level-1/a.bin"), "at() must have the file's name, for messages")


def check_large_file(open_storage: Callable[[], Storage]) -> None:
    """Check that a file of more than one part of an upload comes back."""
    data = bytes(range(256)) * (PART_BYTES // 256)
    write(open_storage(), "model", data)
    with open_storage().reading("model") as path:
        require(path.read_bytes() == data, f"A file of {PART_BYTES:,} bytes must come back as it was written")


def check_folders(open_storage: Callable[[], Storage]) -> None:
    """Check that a folder appears with all its files, and that nothing is left of the one that it replaces."""
    storage, other = open_storage(), open_storage()
    for name in ("old", "new"):
        before = sorted(other.names("export"))
        with storage.writing_folder("export") as folder:
            (folder / "inner").mkdir()
            for path in (folder / name, folder / "inner" / name):
                path.write_bytes(name.encode())
            require(sorted(other.names("export")) == before, "No file may appear before writing_folder() ends")
    require(
        sorted(other.names("export")) == ["export/inner/new", "export/new"],
        "writing_folder() must replace the whole folder, and leave no file of the one before",
    )
    with other.reading_folder("export") as folder:
        found = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
        require(found == {"new", "inner/new"}, "reading_folder() must give all files of the folder")


def check_interrupted(open_storage: Callable[[], Storage]) -> None:
    """Check that a block that raises changes nothing."""
    storage = open_storage()
    before = {name: storage.read(name) for name in storage.names() if name != "model"}
    for name in ("level-1/a.bin", "level-1/new.bin", "export"):
        writing = "writing_folder" if name == "export" else "writing"
        try:
            with getattr(storage, writing)(name) as path:
                (path / "x" if name == "export" else path).write_bytes(b"half")
                raise BlockError
        except BlockError:
            pass
        other = open_storage()
        after = {name: other.read(name) for name in other.names() if name != "model"}
        require(after == before, f'An error in the block of {writing}("{name}") must leave all as it was')


def check_append(open_storage: Callable[[], Storage]) -> None:
    """Check that a line is added after all that is complete."""
    storage = open_storage()
    for line in (b"one", b"two"):
        storage.append("level-1/journal", line)
    require(open_storage().read("level-1/journal") == b"one\ntwo\n", "append() must add one line and its newline")
    write(storage, "level-1/journal", b"one\ntwo\nhalf a li")
    storage.append("level-1/journal", b"three")
    require(
        open_storage().read("level-1/journal") == b"one\ntwo\nthree\n",
        "append() must first remove a last line without its newline, which a crash left",
    )


def check_lock(open_storage: Callable[[], Storage]) -> None:
    """Check that one driver at a time holds the lock, and that locks are no files of the run."""
    before = sorted(open_storage().names())
    with open_storage().lock():
        require(open_storage().is_locked(), "is_locked() must be True while another holds the lock")
        require(sorted(open_storage().names()) == before, "names() must not give what the lock is made of")
        try:
            with open_storage().lock():
                require(False, "lock() must raise UserError while another holds it")
        except UserError:
            pass
    require(not open_storage().is_locked(), "is_locked() must be False after the block of lock()")
    with open_storage().lock():
        pass  # a lock that was given back can be taken again
