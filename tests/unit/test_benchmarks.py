import importlib.util
import json
import runpy
import sys

import pytest
import torch
from support.paths import ROOT

from raymask.core.errors import UserError

BENCHMARKS = ROOT / "jobs" / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load("run")


def started(name, *arguments):
    """Run a script as `python NAME.py` would, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")


def test_the_documentation_has_the_table_of_what_was_measured_last():
    results = json.loads(run.RESULTS.read_text(encoding="utf-8"))
    assert list(results) == list(run.ORDER)
    begin, end = run.pages.begin(run.SCRIPT), run.pages.END
    assert f"{begin}\n\n{run.table(results)}\n\n{end}" in run.PAGE.read_text(encoding="utf-8")


def test_a_table_takes_the_place_of_the_one_before_and_a_page_without_a_place_is_refused(tmp_path):
    page, begin = tmp_path / "page.md", run.pages.begin("a.py")
    page.write_text(f"above\n\n{begin}\n\nold\n\n{run.pages.END}\n\nbelow\n")
    for text in ("new", "newer"):
        run.pages.write_table(page, "a.py", text)
        assert page.read_text() == f"above\n\n{begin}\n\n{text}\n\n{run.pages.END}\n\nbelow\n"
    with pytest.raises(
        UserError, match=r"page\.md: has no place for the table: write <!-- b\.py writes this table -->"
    ):
        run.pages.write_table(page, "b.py", "text")
    with pytest.raises(UserError, match=r"none\.md: cannot be read: No such file"):
        run.pages.write_table(tmp_path / "none.md", "a.py", "text")


def test_every_benchmark_is_run_by_the_one_command_or_needs_a_gpu_or_much_memory():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert scripts == {*run.ORDER, "run", "harness", "reference", "gpu", "billion"}


def test_a_missed_bar_is_in_the_table():
    found = {"what": "a", "against": "b", "ours": 1.0, "theirs": 2000.0, "unit": "s", "ratio": None, "bar": "c"}
    lines = run.table({"x": [found | {"met": False, "note": "", "machine": "m"}]}).splitlines()
    assert lines[2:] == ["| a | 1 s | b | 2,000 s |  | c | **no** |", "", "Measured on m."]


def test_a_name_that_is_no_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        started("run", "fastest")
    assert end.value.code == 2
    assert "there are benchmarks called masks, training, " in capsys.readouterr().err


def test_the_masks_benchmark_runs(capsys):
    threads = torch.get_num_threads()
    try:
        started("masks", "--quick")
    finally:
        torch.set_num_threads(threads)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(found) == 4
    assert found[0]["ratio"] > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(capsys):
    with pytest.raises(SystemExit) as end:
        started("gpu", "--in-process")
    assert end.value.code == 2
    assert "no CUDA device was found" in capsys.readouterr().err
