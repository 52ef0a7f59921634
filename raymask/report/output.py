"""Standard output of a command: what it cannot encode is replaced, and a search goes on when it is lost."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from raymask.core.errors import TRACEBACK_NOTE, UserError


class StandardOutput:
    """Standard output that a command can lose, to a closed pipe or a full disk.

    Attributes:
        stream: The stream behind it.
        required: Whether the command ends when the output is lost. If not, that is said once on stderr, and the rest of
            the output is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.required = True
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text; see `lose` for what happens when that fails."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self.lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream; see `lose` for what happens when that fails."""
        try:
            self.stream.flush()
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        """Connect the stream to /dev/null, so that nothing fails a second time, and end the command or go on.

        Args:
            error: Why the stream cannot be written.

        Raises:
            BrokenPipeError: The output is required, and its reader has closed it.
            UserError: The output is required, and it cannot be written for another reason.
        """
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
        if self.required and isinstance(error, BrokenPipeError):
            raise error
        message = f"standard output: cannot be written: {error.strerror}"
        if self.required:
            raise UserError(message) from None
        say_on_stderr(f"{message}; going on without it")


@contextmanager
def standard_output() -> Iterator[None]:
    """Make `sys.stdout` a StandardOutput for the block, and write what is left when the block ends.

    Raises:
        BrokenPipeError: The output is required, and its reader has closed it.
        UserError: The output is required, and it cannot be written for another reason.
    """
    open_standard_streams()
    before, output = sys.stdout, StandardOutput(sys.stdout)
    sys.stdout = output
    try:
        yield
    finally:
        sys.stdout = before
        output.flush()


def open_standard_streams() -> None:
    """Connect standard streams that are closed (`raymask ... >&-`) to /dev/null.

    Otherwise the next file that is opened gets the stream's number, and whatever is printed lands in that file.
    """
    is_closed = sys.stdout is None
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False, encoding="utf-8"))
    if is_closed:
        say_on_stderr("standard output is closed; going on without it")


def say_on_stderr(message: str) -> None:
    """Print a message on stderr, if anyone can read it."""
    with suppress(OSError):
        print(f"raymask: {message}", file=sys.stderr, flush=True)


def where_traceback(error: Exception) -> str:
    """Where an unexpected error's traceback is, as a sentence: in the run directory, or now in a temporary file.

    Where no file can be written, it is the traceback itself.

    Args:
        error: The error; a search has noted where its traceback is.
    """
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(TRACEBACK_NOTE)]
    if notes:
        return str(notes[0])
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="raymask-traceback-", suffix=".txt", delete=False) as file:
            file.write(text)
    except OSError:
        return text
    return f"{TRACEBACK_NOTE}{file.name}"
