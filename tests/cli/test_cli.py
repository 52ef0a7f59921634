"""Does the command line do what its help says, as a user types it?"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raymask.cli import app
from raymask.core.records import Result
from raymask.store import RunDir
from raymask.train import quickstart
from raymask.train.metrics import measure

RAYMASK = str(Path(sys.executable).with_name("raymask"))
SHORT = [
    *("--set", "levels=[0.5, 0.9]"),
    *("--set", "candidates.count=3"),
    *("--set", "dense.epochs=2"),
    *("--set", "finetune.epochs=0.5"),
    *("--set", "probe.epochs=0.3"),
]
TREE = [*SHORT, "--set", "probe.rungs=[0.5, 1.0]", "--set", "select={keep: 2, beam: true}"]
"""The quickstart in seconds."""


def raymask(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RAYMASK, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=280)


def refused(*words: str | Path, cwd: Path | None = None) -> str:
    """What the command says on stderr when it ends with exit code 2, one message and no traceback."""
    done = raymask(*words, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def spec_file(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


def result_of(run: Path) -> Result:
    found = RunDir(run).read_result()
    assert found is not None
    return found


def test_every_command_s_help_has_an_example_that_it_takes() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        program, called, *words = shlex.split(command.epilog.removeprefix("Example: "))
        assert (program, called) == ("raymask", name)
        assert command.make_context(name, words).params


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    done = raymask("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("search", "check", "show"))
    code = "import sys, raymask.cli; print({'torch', 'ray', 'transformers', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_all_mistakes_of_a_spec_are_said_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    path = spec_file(tmp_path, "model: m\ntask: glue/mrcp\nprobe: {epocs: 1}\nlevels: [0.9, 0.5]\n")
    said = refused("search", path, "--run", tmp_path / "run")
    for part in ("task: no task is called 'glue/mrcp'", "probe.epocs: there is no such key", "levels: sparsities must"):
        assert part in said
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = spec_file(tmp_path, f"model: {tmp_path / 'folder'}\ntask: glue/mrpc\n")
    said = refused("search", path, "--run", tmp_path / "run")
    assert "the folder needs config.json, model.safetensors and a tokenizer" in said
    assert not (tmp_path / "run").exists()


def test_an_override_that_is_none_is_said() -> None:
    assert "write it as key=value" in refused("check", "--set", "candidates")


def test_a_missing_spec_is_said(tmp_path: Path) -> None:
    assert "nowhere.yaml: there is no such file" in refused("search", tmp_path / "nowhere.yaml")


def test_a_password_in_a_run_s_uri_is_refused_and_never_printed() -> None:
    said = raymask("search", "--run", "s3://key:hunter2@bucket/run")
    assert said.returncode == 2
    assert "credentials do not belong in a URI" in said.stderr
    assert "hunter2" not in said.stdout + said.stderr


def test_what_is_no_run_cannot_be_shown(tmp_path: Path) -> None:
    assert "is not a run directory" in refused("show", tmp_path)


@pytest.mark.ray
def test_a_gpu_that_is_not_there_is_said_at_once_and_nothing_is_trained(tmp_path: Path) -> None:
    said = refused("search", "--run", tmp_path / "run", "--set", "workers.gpus=1")
    assert "no node can hold a worker: one asks for 1 CPUs, 1 GPUs" in said
    assert not (tmp_path / "run").exists()


# --- check and show --------------------------------------------------------------------------------------------------


def test_check_says_when_no_worker_fits(tmp_path: Path) -> None:
    said = refused("check", "--set", "workers.cpus=1000", cwd=tmp_path)
    assert "no node can hold a worker: one asks for 1000 CPUs" in said


def test_a_path_may_look_like_markup(tmp_path: Path) -> None:
    (tmp_path / "a[").mkdir()
    assert "a[/x]: is not a run directory" in refused("show", "a[/x]", cwd=tmp_path)


def test_check_says_when_a_gang_does_not_fit(tmp_path: Path) -> None:
    said = refused("check", "--set", "workers.cpus=0.25", "--set", "workers.gang=1024", cwd=tmp_path)
    assert "no node can hold a worker: one asks for 0.25 CPUs" in said
    assert "for each of its 1024 processes (workers.gang)" in said.replace("\n", " ")


def test_check_says_what_will_be_pruned_and_what_it_costs(tmp_path: Path) -> None:
    done = raymask("check", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "matrices with",
        "3,600 train, 400 select (400 of them score candidates), 1,000 report",
        "control + 3",
        "epochs of training",
        "GiB a worker",
        "room for",
    ):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_check_says_how_rungs_and_a_beam_are_peopled(tmp_path: Path) -> None:
    done = raymask("check", *TREE, "--set", "candidates.count=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rungs    of 8 random masks 8 to 50%, 4 to 100% of the early evaluation, and every control\n" in done.stdout
    for part in (" control + 8 ", " 2 x (control + 8) "):
        assert part in done.stdout


def test_check_says_how_workers_that_would_stand_idle_can_be_used(tmp_path: Path) -> None:
    quarter = ("--set", "workers.cpus=0.25", "--set", "workers.count=4", "--set", "imp.run=false")
    said = "fine-tuning takes 1 of 4 workers: finetune.shards lets several train one model"
    assert said in raymask("check", *SHORT, *quarter, cwd=tmp_path).stdout.replace("\n", " ")
    assert "idle" not in raymask("check", *SHORT, *quarter, "--set", "finetune.shards=4", cwd=tmp_path).stdout


@pytest.mark.long
def test_an_audit_says_how_well_early_scores_agree_with_the_end(tmp_path: Path) -> None:
    done = raymask("audit", "--in-process", "--run", "run", *SHORT, "--set", "levels=[0.9]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("all masks, fine-tuned", "candidate 3", "agreement", "with final loss", "1 is the same order"):
        assert part in done.stdout
    assert "candidates.count: an audit holds two or more" in refused(
        "audit", "--run", "other", *SHORT, "--set", "candidates.count=1", cwd=tmp_path
    )


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.long
def test_a_search_prints_its_table_exports_and_is_shown_again(tmp_path: Path) -> None:
    """The whole way through Ray; the export is loaded by transformers alone and scores what the table says."""
    done = raymask("search", "--run", "run", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    for part in ("dense", "control (IMP)", "selected", "95 % interval", "ready to load, in run/export"):
        assert part in done.stdout
    result = result_of(tmp_path / "run")
    assert [row.name for row in result.rows] == ["dense", "control (IMP)", "selected"]
    check_export(tmp_path / "run" / "export", result)

    again = raymask("search", "--run", "run", *SHORT, cwd=tmp_path)
    assert again.returncode == 0
    assert "early evaluation" not in again.stdout.split("Took")[0]
    assert result.levels[-1].digest in again.stdout
    shown = raymask("show", "run", cwd=tmp_path)
    assert result.levels[-1].digest in shown.stdout
    as_json = json.loads(raymask("show", "run", "--json", cwd=tmp_path).stdout)
    assert Result.model_validate(as_json["result"]) == result
    assert as_json["starts"][0]["versions"]["ray"]
    assert as_json == json.loads((tmp_path / "run" / "report.json").read_text()) | {"written": as_json["written"]}
    compared = raymask("compare", "run", "--html", "page.html", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert "Side by side" in compared.stdout
    assert "<title>run</title>" in (tmp_path / "page.html").read_text()
    assert "none: is not a run directory" in refused("compare", "run", "none", cwd=tmp_path)

    other = refused("search", "--run", "run", *SHORT, "--set", "seed=9", cwd=tmp_path)
    assert "seed: 0 there, 9 now" in other


def check_export(folder: Path, result: Result) -> None:
    """A plain checkpoint: exact zeros, no sparsity_config, a tokenizer, and the reported score."""
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "sparsity" not in (folder / "config.json").read_text()
    zeros = sum(int((weight == 0).sum()) for name, weight in module.named_parameters() if "encoder" in name)
    last = result.levels[-1]
    assert zeros >= last.total - last.kept
    assert module.config.id2label == {0: "negative", 1: "positive"}
    texts, labels = quickstart.sentences(7)["report"]  # other sentences of the same kind must work as well
    with torch.no_grad():
        logits = module(**tokenizer(texts[:300], padding=True, return_tensors="pt")).logits
    found = measure(("accuracy",), logits.numpy(), torch.tensor(labels[:300]).numpy())["accuracy"]
    assert found == pytest.approx(result.rows[-1].report["accuracy"], abs=0.12)
    card = (folder / "README.md").read_text()
    assert last.digest in card
    assert f"{result.rows[-1].report['accuracy']:.4f}" in card


# --- killed and continued --------------------------------------------------------------------------------------------

MOMENTS = {
    "while the dense model trains": "dense model: fine-tuning",
    "at the first candidate": "control: score",
    "while a mask is fine-tuned": "level 1/2, sparsity 50.00%: fine-tuning",
    "between two lineages": "sparsity 50.00%: select",
    "at the last level": "level 2/2, sparsity 90.00%: early evaluation",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = raymask("search", "--in-process", "--run", folder / "run", *SHORT)
    assert done.returncode == 0, done.stderr
    return result_of(folder / "run")


@pytest.mark.faults
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_and_the_same_command_find_the_same_mask(tmp_path: Path, undisturbed: Result, moment: str) -> None:
    """Killed on Ray, continued on Ray, compared with a search that ran undisturbed in one process."""
    result = killed_and_continued(tmp_path / "run", SHORT, MOMENTS[moment])
    mine = [(level.digest, level.winner.candidate, level.winner.score) for level in result.levels]
    assert mine == [(level.digest, level.winner.candidate, level.winner.score) for level in undisturbed.levels]
    assert result.rows == undisturbed.rows


MOMENTS_OF_A_TREE = {
    "in the middle of a rung": "after 50%: score",
    "while branches are fine-tuned": "level 1/2, sparsity 50.00%: fine-tuning",
    "in the middle of a beam's level": "of branch 2 after 50%: score",
}


@pytest.fixture(scope="module")
def undisturbed_tree(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("tree")
    done = raymask("search", "--in-process", "--run", folder / "run", *TREE)
    assert done.returncode == 0, done.stderr
    return result_of(folder / "run")


@pytest.mark.faults
@pytest.mark.parametrize("moment", MOMENTS_OF_A_TREE)
def test_kill_9_of_a_tree_of_rungs_and_the_same_command_find_the_same_tree(
    tmp_path: Path, undisturbed_tree: Result, moment: str
) -> None:
    result = killed_and_continued(tmp_path / "run", TREE, MOMENTS_OF_A_TREE[moment])
    assert tree_of(result) == tree_of(undisturbed_tree)


def tree_of(result: Result) -> list[Any]:
    """What must be the same in every search of a spec."""
    levels = [*result.levels, *result.others, *result.imp]
    winners = [level.winner.model_copy(update={"started": 0.0, "seconds": 0.0, "worker": ""}) for level in levels]
    return [*winners, *((level.digest, level.gain, level.confidence) for level in levels), result.rows]


def killed_and_continued(run: Path, settings: list[str], moment: str) -> Result:
    """A search on Ray that ended by kill -9 soon after it said something, and goes on without repeating anything."""
    command = [RAYMASK, "search", "--run", str(run), *settings]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert victim.stdout is not None
    for line in victim.stdout:
        if moment in line:
            break
    else:
        pytest.fail(f"the search ended before it said {moment!r}")
    time.sleep(0.3)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    known = lines(run)
    done = raymask("search", "--run", run, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(run)[: len(known)] == known
    return result_of(run)


def lines(run: Path) -> list[str]:
    """The journals' lines, level after level: none is ever written twice."""
    found = [line for path in sorted(run.glob("level-*/evaluations.jsonl")) for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in found]
    keys = [(record["candidate"]["level"], record["candidate"]["index"], record["rung"]) for record in records]
    assert len(keys) == len(set(keys))
    return found


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(("how", "where"), [(signal.SIGINT, "--in-process"), (signal.SIGTERM, "--set=seed=0")])
def test_ctrl_c_or_the_end_of_a_job_ends_at_once_and_says_how_to_go_on(
    tmp_path: Path, how: signal.Signals, where: str
) -> None:
    command = [RAYMASK, "search", where, "--run", str(tmp_path / "run"), *SHORT]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    while "fine-tuning" not in victim.stdout.readline():
        pass
    victim.send_signal(how)
    _, said = victim.communicate(timeout=60)
    assert victim.returncode == 130
    assert said.strip() == "raymask: stopped; the same command goes on from here"
