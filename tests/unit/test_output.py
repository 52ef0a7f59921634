"""Standard output that cannot show a character, is full, or that nobody reads."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from support.builders import refused

from raymask.core.errors import TRACEBACK_NOTE
from raymask.report.output import StandardOutput, standard_output, where_traceback


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w", encoding="utf-8")


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def test_what_the_terminal_cannot_show_is_replaced_in_tables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    with standard_output():
        table = Table("café")
        table.add_row(Text("thé"))
        Console(width=20).print(table)
        print("fin é")
    lines = content.getvalue().decode("ascii").splitlines()
    assert [line.strip("| ") for line in lines if "?" in line] == ["caf?", "th?", "fin ?"]
    assert lines[0].startswith("+-"), "a table's frame is of letters that the terminal has"


def test_a_full_disk_ends_a_command_whose_output_is_all_it_makes() -> None:
    with full_disk() as stream:
        output = StandardOutput(stream)
        print("a line", file=output)  # type: ignore[call-overload]
        assert refused(output.flush) == "standard output: cannot be written: No space left on device"
        output.flush()


def test_a_reader_that_has_gone_ends_it_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    with closed_pipe() as stream:
        output = StandardOutput(stream)
        output.write("a line\n")
        with pytest.raises(BrokenPipeError):
            output.flush()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("lost", "why"), [(full_disk, "No space left on device"), (closed_pipe, "Broken pipe")])
def test_a_search_goes_on_and_says_it_once(
    capsys: pytest.CaptureFixture[str], lost: type[io.TextIOWrapper], why: str
) -> None:
    with lost() as stream:
        output = StandardOutput(stream)
        output.required = False
        for _ in range(3):
            output.write("x" * 100_000)
            output.flush()
    said = f"raymask: standard output: cannot be written: {why}; going on without it\n"
    assert capsys.readouterr().err == said


def test_an_unexpected_error_s_traceback_is_where_it_was_noted_or_in_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError) as raised:
        1 / 0  # noqa: B018
    path = Path(where_traceback(raised.value).removeprefix(TRACEBACK_NOTE))
    assert "in test_an_unexpected_error" in path.read_text()
    raised.value.add_note(f"{TRACEBACK_NOTE}run/traceback.txt")
    assert where_traceback(raised.value) == "The traceback is in run/traceback.txt"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert where_traceback(ZeroDivisionError("no")) == "ZeroDivisionError: no\n"
