"""jobs/chaos.py itself: faults, rounds and their verdicts."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

CHAOS = Path(__file__).resolve().parents[2] / "jobs" / "chaos.py"


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CHAOS.parent))
        return import_module("chaos")


def first(chaos: ModuleType, rounds: int, seed: int) -> list[str]:
    return list(islice(chaos.schedule(seed), rounds))


def test_the_faults_come_in_an_order_that_the_seed_decides(chaos: ModuleType) -> None:
    assert first(chaos, 50, 0) == first(chaos, 50, 0) != first(chaos, 50, 1)


@pytest.mark.parametrize("seed", range(5))
def test_every_fault_comes_before_any_comes_again(chaos: ModuleType, seed: int) -> None:
    whole = len(chaos.FAULTS)
    found = first(chaos, 3 * whole - 1, seed)
    for start in (0, whole):
        assert sorted(found[start : start + whole]) == sorted(chaos.FAULTS)
    assert max(Counter(found).values()) == 3


@pytest.mark.parametrize(
    ("rounds", "minutes", "played"),
    [(None, None, 12), (50, None, 50), (None, 2.0, 5), (3, 2.0, 3), (50, 2.0, 5), (None, 0.0, 1), (None, 2.4, 6)],
)
def test_rounds_begin_until_there_are_enough_or_the_time_is_over(
    chaos: ModuleType, rounds: int | None, minutes: float | None, played: int
) -> None:
    """25 seconds each."""
    found = 0
    while not chaos.enough(found, 25.0 * found, rounds, minutes):
        found += 1
    assert found == played


def test_moments_lie_in_the_faults_part_of_the_search_and_get_earlier(chaos: ModuleType) -> None:
    fault = chaos.Fault(lambda search, dice: "", 0.2, 0.8)
    for attempt, last in ((0, 16), (1, 10), (2, 7)):
        lines = {fault.moment(Random(seed), attempt, 20)[0] for seed in range(500)}
        assert (min(lines), max(lines)) == (4, last)
    assert fault.moment(Random("0 1 0"), 0, 20) == fault.moment(Random("0 1 0"), 0, 20)


def test_a_difference_in_the_last_bit_is_found(chaos: ModuleType) -> None:
    expected = {"level 1 mask": "ab", "level 1 magnitude mask score": 0.1 + 0.2, "level 1 candidate 1 score": None}
    assert chaos.differences(expected, dict(expected)) == []
    assert chaos.differences(expected, json.loads(json.dumps(expected))) == []
    assert chaos.differences(expected, expected | {"level 1 magnitude mask score": 0.3}) == [
        "level 1 magnitude mask score: 0.3 instead of 0.30000000000000004"
    ]
    assert chaos.differences(expected, {}) == [
        "level 1 mask: None instead of ab",
        "level 1 magnitude mask score: None instead of 0.30000000000000004",
    ]
    assert chaos.differences({}, {"level 1 mask": "ab"}) == ["level 1 mask: ab instead of None"]


@pytest.mark.parametrize(
    ("said", "file"),
    [
        (
            "/a b/level-1/model.safetensors: its hash differs. Delete /a b/level.json to do this level again",
            "level.json",
        ),
        ("/a b/level.json: is damaged. Delete it to do this level again", "level.json"),
        ("/a b/level.json: was made from another parent. Delete it to do the level again", "level.json"),
        ("/a b/j.jsonl: line 2 is damaged. Delete the file to evaluate this level again", "j.jsonl"),
    ],
)
def test_the_file_that_a_refusal_says_to_delete_is_found(chaos: ModuleType, said: str, file: str) -> None:
    assert chaos.advised(f"raymask: {said}") == Path("/a b", file)


def test_a_refusal_without_such_advice_names_no_file(chaos: ModuleType) -> None:
    assert chaos.advised("raymask: /a/run: another raymask is working in it; wait for it") is None
    assert chaos.advised("raymask: IMP: its workers failed. The same command goes on from here") is None


def test_what_was_evaluated_twice_or_written_anew_is_found(chaos: ModuleType, tmp_path: Path) -> None:
    def line(index: int, machine: bool = False) -> str:
        return json.dumps({"candidate": {"level": 1, "index": index}, "system_failure": machine}) + "\n"

    journal = tmp_path / "level-1" / "evaluations.jsonl"
    journal.parent.mkdir()
    journal.write_text(line(0) + line(1, machine=True) + line(1))
    assert chaos.repeated(tmp_path) == []
    assert chaos.kept(journal, line(0).encode())
    assert not chaos.kept(journal, line(1).encode())
    assert not chaos.kept(journal.with_name("level.json"), b"")
    with journal.open("a") as file:
        file.write(line(0))
    assert chaos.repeated(tmp_path) == ["level 1: candidate 0 evaluated 2 times"]
