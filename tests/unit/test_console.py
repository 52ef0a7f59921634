"""Console output of a search: bars on a terminal, lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raymask.config import make_spec
from raymask.core.lineage import IMP, SEARCH
from raymask.core.masking.noise import Noise
from raymask.core.records import (
    Candidate,
    ConfidenceInterval,
    EvalPoint,
    Evaluation,
    FinetuneResult,
    LevelRecord,
)
from raymask.report import console as console_module
from raymask.report.console import LogCallback, ProgressBarCallback, progress_callback
from raymask.report.progress import Progress

SPEC = make_spec({"model": "quickstart", "task": "quickstart"})
CANDIDATE = Candidate(level=1, index=3, seed=1, density=0.5, noise=Noise(exponent=5, sampling_ratio=1e-4))
POINT = EvalPoint(step=50, loss=0.25, metric=0.9)
EVALUATION = Evaluation(candidate=CANDIDATE, score=-0.25, curve=(POINT,), distance=0.125, digest="d", seconds=2.0)
FAILED = Evaluation(candidate=CANDIDATE, error="ValueError: [/red] no")
LEVEL = LevelRecord(
    level=1,
    density=0.5,
    num_kept=4,
    num_prunable=8,
    winner=EVALUATION,
    num_evaluated=9,
    num_failed=1,
    gain=ConfidenceInterval(mean=0.01, low=-0.02, high=0.04),
    win_probability=0.75,
    finetune_result=FinetuneResult(curve=(POINT,), best=0, started=0.0, seconds=61.0, worker="w"),
    test_metrics={"accuracy": 0.9},
    digest="d",
    parent_key="p",
    data_fingerprint="d",
)


def output(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_has_a_line_per_event_and_no_control_characters() -> None:
    console = Console(file=io.StringIO(), width=200)
    with progress_callback(console, SPEC) as callback:
        assert type(callback) is LogCallback
        callback.on_phase_begin("level 1/4, sparsity 50.00%: early evaluation", 1, 9, [EVALUATION, EVALUATION])
        callback.on_evaluation(EVALUATION)
        callback.on_evaluation(FAILED)
        callback.on_level_end(SEARCH, LEVEL)
        callback.on_level_end(IMP, LEVEL.model_copy(update={"gain": None, "win_probability": None}))
        callback.on_message("candidate 3: its worker was lost")
    lines = [line.split("s] ", 1)[1] for line in output(console).splitlines()]
    assert lines == [
        "level 1/4, sparsity 50.00%: early evaluation, 2 of 9 known",
        "  candidate 3: score -0.2500, last loss 0.2500, last metric 0.9000, distance 12.50%, 2.0 s",
        "  candidate 3: failed: ValueError: [/red] no",
        "  raymask (candidate 3), sparsity 50.00%: validation loss 0.2500, metric 0.9000, 1 min 1 s; early loss below "
        "the magnitude mask's by +0.0100 (95 % interval -0.0200 to +0.0400), within noise; the lowest of 9 with a "
        "probability of 75%",
        "  IMP, sparsity 50.00%: validation loss 0.2500, metric 0.9000, 1 min 1 s",
        "  candidate 3: its worker was lost",
    ]


def test_a_log_tells_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200)
    lines = LogCallback(console, SPEC)
    lines.on_phase_begin("level 1/4, sparsity 54.00%: early evaluation", 1, 8, [EVALUATION])
    lines.on_progress({"candidate 3": 0.5})
    assert len(output(console).splitlines()) == 1
    monkeypatch.setattr(console_module, "MIN_LOG_INTERVAL_S", -1.0)
    lines.on_progress({"candidate 3": 0.5, "magnitude mask": 0.25})
    assert (
        output(console)
        .splitlines()[1]
        .split("s] ", 1)[1]
        .startswith(
            "progress: level 1/4, sparsity 54.00%: early evaluation: 1 of 8 done, 2 running (candidate 3 50%, "
            "magnitude mask 25%), 0 failed, best score -0.2500 (candidate 3), about "
        )
    )
    lines.on_progress({})
    assert len(output(console).splitlines()) == 2


def test_a_terminal_has_a_bar_for_the_phase_and_for_everything_at_work() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)

    def bars() -> dict[str, tuple[float, float | None]]:
        return {task.description: (task.completed, task.total) for task in callback.bars.tasks}

    with progress_callback(console, SPEC) as callback:
        assert isinstance(callback, ProgressBarCallback)
        callback.on_phase_begin("early evaluation", 1, 9, [EVALUATION, FAILED])
        callback.on_progress({"magnitude mask": 0.5, "candidate 3": 0.25})
        phase = "early evaluation, 1 failed, best score -0.2500 (candidate 3)"
        assert bars() == {phase: (2.75, 9), "  magnitude mask": (0.5, 1.0), "  candidate 3": (0.25, 1.0)}
        callback.on_evaluation(EVALUATION)
        callback.on_progress({"magnitude mask": 0.75})
        assert bars() == {phase: (3.75, 9), "  magnitude mask": (0.75, 1.0)}
        callback.on_phase_begin("fine-tuning", 1, 2)
        assert bars() == {"fine-tuning": (0, 2)}
        callback.on_level_end(SEARCH, LEVEL)
        callback.on_progress({})
        assert bars() == {"fine-tuning": (1, 2)}
    assert "candidate 3: score -0.2500" in output(console)


def test_the_time_left_is_seen_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    monkeypatch.setattr(Progress, "left", lambda self: 125.0)
    with progress_callback(console, SPEC) as callback:
        callback.on_phase_begin("level 1/4, sparsity 54.00%: early evaluation", 1, 9, [EVALUATION])
        callback.on_progress({"magnitude mask": 0.5})
    assert "about 2 min 5 s left" in output(console)
    assert "level 1/4, sparsity 54.00%" in output(console)
