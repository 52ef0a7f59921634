"""Is the progress alive on a terminal, and plain in a log?"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raymask.config import make_spec
from raymask.core.records import Candidate, Evaluation, FineTuned, Interval, Level, Noise, Point
from raymask.report import terminal
from raymask.report.progress import Progress
from raymask.report.terminal import Bars, Lines, watching
from raymask.store import IMP, SEARCH

SPEC = make_spec({"model": "quickstart", "task": "quickstart"})
CANDIDATE = Candidate(level=1, index=3, seed=1, density=0.5, noise=Noise(exponent=5, ratio=1e-4))
POINT = Point(step=50, loss=0.25, metric=0.9)
EVALUATION = Evaluation(candidate=CANDIDATE, score=-0.25, curve=(POINT,), distance=0.125, digest="d", seconds=2.0)
FAILED = Evaluation(candidate=CANDIDATE, error="ValueError: [/red] no")
LEVEL = Level(
    level=1,
    density=0.5,
    kept=4,
    total=8,
    winner=EVALUATION,
    evaluated=9,
    failed=1,
    gain=Interval(mean=0.01, low=-0.02, high=0.04),
    confidence=0.75,
    finetuned=FineTuned(curve=(POINT,), best=0, started=0.0, seconds=61.0, worker="w"),
    report={"accuracy": 0.9},
    digest="d",
    parent="p",
    data="d",
)


def output(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_has_a_line_per_event_and_no_control_characters() -> None:
    console = Console(file=io.StringIO(), width=200)
    with watching(console, SPEC) as watch:
        assert type(watch) is Lines
        watch.begins("level 1/4, sparsity 50.00%: early evaluation", 1, 9, [EVALUATION, EVALUATION])
        watch.evaluated(EVALUATION)
        watch.evaluated(FAILED)
        watch.settled(SEARCH, LEVEL)
        watch.settled(IMP, LEVEL.model_copy(update={"gain": None, "confidence": None}))
        watch.note("candidate 3: its worker was lost")
    lines = [line.split("s] ", 1)[1] for line in output(console).splitlines()]
    assert lines == [
        "level 1/4, sparsity 50.00%: early evaluation, 2 of 9 known",
        "  candidate 3: score -0.2500, last loss 0.2500, last metric 0.9000, 12.50% from control, 2.0 s",
        "  candidate 3: failed: ValueError: [/red] no",
        "  selected (candidate 3), sparsity 50.00%: select loss 0.2500, metric 0.9000, 1 min 1 s; early loss below the "
        "control's by +0.0100 (95 % interval -0.0200 to +0.0400), within noise; the lowest of 9 with a probability of "
        "75%",
        "  control (IMP), sparsity 50.00%: select loss 0.2500, metric 0.9000, 1 min 1 s",
        "  candidate 3: its worker was lost",
    ]


def test_a_log_tells_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200)
    lines = Lines(console, SPEC)
    lines.begins("level 1/4, sparsity 54.00%: early evaluation", 1, 8, [EVALUATION])
    lines.running({"candidate 3": 0.5})
    assert len(output(console).splitlines()) == 1
    monkeypatch.setattr(terminal, "OFTEN", -1.0)
    lines.running({"candidate 3": 0.5, "control": 0.25})
    assert (
        output(console)
        .splitlines()[1]
        .split("s] ", 1)[1]
        .startswith(
            "progress: level 1/4, sparsity 54.00%: early evaluation: 1 of 8 done, 2 running (candidate 3 50%, control "
            "25%), 0 failed, best score -0.2500 (candidate 3), about "
        )
    )
    lines.running({})
    assert len(output(console).splitlines()) == 2


def test_a_terminal_has_a_bar_for_the_stage_and_for_everything_at_work() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)

    def bars() -> dict[str, tuple[float, float | None]]:
        return {task.description: (task.completed, task.total) for task in watch.bars.tasks}

    with watching(console, SPEC) as watch:
        assert isinstance(watch, Bars)
        watch.begins("early evaluation", 1, 9, [EVALUATION, FAILED])
        watch.running({"control": 0.5, "candidate 3": 0.25})
        stage = "early evaluation, 1 failed, best score -0.2500 (candidate 3)"
        assert bars() == {stage: (2.75, 9), "  control": (0.5, 1.0), "  candidate 3": (0.25, 1.0)}
        watch.evaluated(EVALUATION)
        watch.running({"control": 0.75})
        assert bars() == {stage: (3.75, 9), "  control": (0.75, 1.0)}
        watch.begins("fine-tuning", 1, 2)
        assert bars() == {"fine-tuning": (0, 2)}
        watch.settled(SEARCH, LEVEL)
        watch.running({})
        assert bars() == {"fine-tuning": (1, 2)}
    assert "candidate 3: score -0.2500" in output(console)


def test_the_time_left_is_seen_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    monkeypatch.setattr(Progress, "left", lambda self: 125.0)
    with watching(console, SPEC) as watch:
        watch.begins("level 1/4, sparsity 54.00%: early evaluation", 1, 9, [EVALUATION])
        watch.running({"control": 0.5})
    assert "about 2 min 5 s left" in output(console)
    assert "level 1/4, sparsity 54.00%" in output(console)
