"""A report in a browser: on a phone and a desktop, light and dark."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.reports import TREE, embedded, run_of, text_of

from raymask.runs.run_dir import REPORT_HTML, RunDir

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("tree"), **TREE)


CHECK_SCRIPT = """
<script>
addEventListener("load", () => setTimeout(() => {
  const drawn = document.querySelectorAll(".plot .main-svg:first-child").length;
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const paper = getComputedStyle(document.body).backgroundColor;
  const seen = [...document.querySelectorAll(".plot")].every(plot => plot.getBoundingClientRect().width > 200);
  parent.document.title = [drawn, wide, paper, seen, window.broken ?? "fine"].join("|");
}, 1500));
addEventListener("error", event => { window.broken = event.message; });
</script>
"""


@pytest.fixture(scope="module")
def pages(finished: RunDir, tree: RunDir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reports, with a few lines that tell how they are drawn."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for name, store in (("finished", finished), ("tree", tree)):
        found[name] = folder / f"{name}.html"
        found[name].write_text(
            text_of(store, REPORT_HTML).replace("<head>", f"<head>{CHECK_SCRIPT}", 1), encoding="utf-8"
        )
    return found


@needs_browser
@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("finished", 390, 1), ("finished", 1280, 0), ("tree", 390, 0), ("tree", 1280, 1)]
)
def test_a_browser_draws_it(pages: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: int) -> None:
    """On a phone and on a desktop, light and dark, without a network."""
    paper = "rgb(255, 255, 255)" if scheme else "rgb(20, 23, 28)"
    frame = tmp_path / "frame.html"  # a window cannot be as narrow as a phone
    frame.write_text(
        f'<!doctype html><meta name="color-scheme" content="light dark"><title>none</title>'
        f'<iframe src="{pages[name].as_uri()}" style="width: {width}px; height: 3000px"></iframe>'
    )
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,3000",
        "--virtual-time-budget=10000",
        "--dump-dom",
    ]
    done = subprocess.run([str(BROWSER), *options, frame.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    plots_there = len(embedded(pages[name].read_text(encoding="utf-8")))
    assert title[1].split("|") == [str(plots_there), "0", paper, "true", "fine"]
