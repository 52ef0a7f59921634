"""Tables that programs write into pages of docs/."""

from __future__ import annotations

from pathlib import Path

from raymask.core.errors import UserError

END = "<!-- its end -->"


def begin(script: str) -> str:
    """The line of a page below which a script of jobs/ writes its table."""
    return f"<!-- {script} writes this table -->"


def split(page: Path, script: str) -> tuple[str, str]:
    """A page up to a script's table, and from its end on. Raises UserError when it has no place for the table."""
    try:
        before, line, rest = page.read_text(encoding="utf-8").partition(begin(script))
    except OSError as error:
        raise UserError(f"{page}: cannot be read: {error.strerror}") from None
    if not line or END not in rest:
        raise UserError(f"{page}: has no place for the table: write {begin(script)} and {END} into it")
    return before + line, END + rest.partition(END)[2]


def write_table(page: Path, script: str, table: str) -> None:
    """Put a script's table into a page, in the place of the one that is there."""
    before, after = split(page, script)
    page.write_text(f"{before}\n\n{table}\n\n{after}", encoding="utf-8")
