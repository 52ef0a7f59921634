"""Pages of the documentation: their code blocks by id, sections, tables and links."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from support.paths import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]

BLOCK = re.compile(r"^<!-- id: (\S+) -->\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")


@cache
def read(path: Path) -> str:
    """A page's text."""
    return path.read_text(encoding="utf-8")


def joined() -> str:
    """README and all pages of docs/, one after the other."""
    return "\n".join(map(read, PAGES))


@cache
def blocks() -> dict[str, tuple[Path, str, str]]:
    """Every code block with an id: its page, its language and its text, by id."""
    found: dict[str, tuple[Path, str, str]] = {}
    for path in PAGES:
        for name, language, text in BLOCK.findall(read(path)):
            assert name not in found, f"{name} is the id of two blocks"
            found[name] = path, language, text
    return found


def block(name: str, language: str) -> str:
    """The text of the code block with this id, which has this language."""
    _, has, text = blocks()[name]
    assert has == language, name
    return text


def num_ids() -> int:
    """How many comments name an id, whether a block follows or not."""
    return len(re.findall(r"<!-- id: ", joined()))


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of a Markdown table, without its head; a bar between backticks parts no cells."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 2, "there is no table"
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def section(path: Path, title: str) -> str:
    """What stands below a heading, up to the next one of its level."""
    parts = read(path).split(f"\n{title}\n")
    assert len(parts) == 2, f"{path.name} has no {title}"
    level = title.split()[0]
    return parts[1].split(f"\n{level} ")[0]


def links(path: Path) -> list[str]:
    """Targets of a page's relative links, code apart."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", read(path)))
    return [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
