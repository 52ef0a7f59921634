"""The timeline: who did what, when, and for how long."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymask.core.records import Phase, Span
from raymask.report.timeline import (
    BAR_WIDTH,
    IDLE,
    LETTERS,
    MAX_BARS,
    MAX_GAP_S,
    bar,
    seconds_by_phase,
    time_axis,
    timeline,
)

KINDS = {letter: kind for kind, letter in LETTERS.items()}
NOW = 1.7e9  # seconds, as a clock has them


def span(started: float, seconds: float, kind: Phase = "dense", worker: str = "host/1 cpu 1 threads fp32") -> Span:
    return Span(worker=worker, phase=kind, level=1, started=started, seconds=seconds)


def spans_of(letters: str, cell: float, worker: str) -> list[Span]:
    """The work that a bar of such letters tells of, when each stands for `cell` seconds."""
    found, start = [], 0
    for letter, run in groupby(letters):
        length = len(list(run))
        if letter != IDLE:
            found.append(span(NOW + start * cell, length * cell, KINDS[letter], worker))
        start += length
    return found


bars = st.text([IDLE, *KINDS], min_size=BAR_WIDTH - 1, max_size=BAR_WIDTH - 1)


@given(first=bars, others=st.lists(bars, max_size=MAX_BARS - 2), cell=st.floats(0.01, 1e5), data=st.data())
def test_a_bar_is_read_as_what_was_done(first: str, others: list[str], cell: float, data: st.DataObject) -> None:
    """Whatever workers do cell by cell, in whatever order it is told."""
    drawn = [f"d{first[:-1]}f", *(IDLE + letters for letters in others)]
    if cell * BAR_WIDTH > MAX_GAP_S:
        drawn.append("f" * BAR_WIDTH)  # while somebody works, nothing is cut out
    work = [spans_of(letters, cell, f"host/{number} cpu") for number, letters in enumerate(drawn)]
    lines = timeline(data.draw(st.permutations([one for of_one in work for one in of_one])))
    expected = {
        f"{letters} {1 - letters.count(IDLE) / BAR_WIDTH:4.0%}  host/{number}"
        for number, letters in enumerate(drawn)
        if work[number]
    }
    assert set(lines[1:-1]) == expected
    assert lines[1].endswith("  host/0")  # who starts first


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.sampled_from([*LETTERS])), max_size=30))
def test_seconds_by_purpose_lose_nothing(work: list[tuple[float, float, Phase]]) -> None:
    spent = seconds_by_phase([span(*one) for one in work])
    assert sum(spent.values()) == pytest.approx(sum(seconds for _, seconds, _ in work))
    assert all(spent[kind] == 0 for kind in LETTERS if kind not in {kind for _, _, kind in work})


def test_a_timeline_says_what_its_letters_mean_and_how_long_each_purpose_took() -> None:
    """A worker that was lost and started again is another one."""
    work = [
        span(NOW, 60, "dense", "a/1 cuda H100 bf16"),
        span(NOW + 60, 30, "early evaluation", "a/1 cuda H100 bf16"),
        span(NOW + 76, 14, "early evaluation", "b/2 cuda H100 bf16"),
        span(NOW + 106, 14, "early evaluation", "a/3 cuda H100 bf16"),
    ]
    assert timeline(work) == [
        "Workers' time, 2.0 s a letter:",
        f"{'d' * 30}{'e' * 15}{IDLE * 15}  75%  a/1",
        f"{IDLE * 38}{'e' * 7}{IDLE * 15}  12%  b/2",
        f"{IDLE * 53}{'e' * 7}  12%  a/3",
        "d dense 1 min 0 s, e early evaluation 58.0 s, . idle",
    ]


def test_a_letter_shows_what_took_most_of_its_time() -> None:
    work = [span(0, 40), span(40, 35, "early evaluation"), span(101, 49, "fine-tuning"), span(249, 51)]
    assert bar(work, 100.0 * BAR_WIDTH).startswith("d.d.")
    assert bar([span(0, 30), span(30, 20, "fine-tuning")], 100.0 * BAR_WIDTH)[0] == IDLE


def test_a_search_that_was_stopped_is_drawn_without_the_stop() -> None:
    work = [span(NOW, 30), span(NOW + 7230, 30, "fine-tuning", "host/2 cpu")]
    assert timeline(work) == [
        "Workers' time, 1.0 s a letter, 2 h 0 min without work cut out:",
        f"{'d' * 30}{IDLE * 30}  50%  host/1",
        f"{IDLE * 30}{'f' * 30}  50%  host/2",
        "d dense 30.0 s, f fine-tuning 30.0 s, . idle",
    ]
    while_another_works = span(NOW + 20, 7200, worker="host/3 cpu")
    assert timeline([*work, while_another_works])[0] == "Workers' time, 2 min 1 s a letter:"


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 1_000)), min_size=1, max_size=30))
def test_only_what_nobody_worked_in_is_cut(work: list[tuple[int, int]]) -> None:
    """Second by second, of the times in which nobody worked those longer than STOP."""
    busy = {second for started, seconds in work for second in range(started, started + seconds)}
    begin, end = min(busy), max(busy) + 1
    runs = [(key, list(run)) for key, run in groupby(range(begin, end), busy.__contains__)]
    kept = [second for works, run in runs if works or len(run) <= MAX_GAP_S for second in run]
    time = time_axis([span(*one) for one in work])
    assert [time.at(started) for started, _ in work] == [kept.index(started) for started, _ in work]
    assert sum(seconds for _, seconds in time.stops) == end - begin - len(kept)


def test_who_comes_after_the_first_workers_is_summed_up() -> None:
    work = [span(number, 100 - number, worker=f"host/{number} cpu") for number in range(MAX_BARS)]
    assert len(timeline(work)) == MAX_BARS + 2
    late = [span(50, seconds, worker=f"late/{seconds} cpu") for seconds in (20, 50)]
    lines = timeline([*late, *work])
    assert [line.rpartition("  ")[2] for line in lines[1:-2]] == [f"host/{number}" for number in range(MAX_BARS)]
    assert lines[-2] == "and 2 more".ljust(BAR_WIDTH) + "  35%"
    assert lines[0] == "Workers' time, 1.7 s a letter:"


@pytest.mark.parametrize("work", [[], [span(NOW, 0.0)]])
def test_without_work_there_is_no_timeline(work: list[Span]) -> None:
    assert timeline(work) == []


def test_an_instant_is_long_enough() -> None:
    assert timeline([span(NOW, 1e-9)])[1] == "d" * BAR_WIDTH + " 100%  host/1"
