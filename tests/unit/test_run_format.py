"""The format number of a run directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.builders import refused
from support.records import write

from raymask.config import load_spec, make_spec
from raymask.core.spec import Spec
from raymask.runs.run_dir import FORMAT, RunDir, check_run


@pytest.fixture
def spec() -> Spec:
    return make_spec({"model": "quickstart", "task": "quickstart"})


def test_a_run_directory_says_its_format_and_its_spec_stays_a_spec(tmp_path: Path, spec: Spec) -> None:
    store = RunDir(tmp_path)
    store.write_spec(spec)
    assert (tmp_path / "spec.yaml").read_text().startswith(f"# raymask run directory, format {FORMAT}\n")
    assert store.read_spec() == load_spec(tmp_path / "spec.yaml") == spec


@pytest.mark.parametrize(("line", "number"), [("", 1), ("# raymask run directory, format 99\n", 99)])
def test_another_format_is_refused_with_what_to_do(tmp_path: Path, spec: Spec, line: str, number: int) -> None:
    store = RunDir(tmp_path, option="--run")
    (tmp_path / "spec.yaml").write_text(line + yaml.safe_dump({"model": "m", "probe": {}}))
    expected = (
        f"{tmp_path}: has run directory format {number}, and this raymask reads format {FORMAT}. Use the version "
        "of raymask that wrote it (see env.json), or choose another directory with --run"
    )
    assert refused(store.read_spec) == expected
    assert refused(RunDir(tmp_path).read_spec) == expected.removesuffix(", or choose another directory with --run")
    write(store)
    assert refused(check_run, store, spec) == expected


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("result.json", lambda store: store.read_result()),
        ("level-1/level.json", lambda store: store.read_level("", 1)),
        ("level-1/evaluations.jsonl", lambda store: store.evaluations(1)),
    ],
)
def test_records_of_another_format_are_not_called_damaged(tmp_path: Path, spec: Spec, name: str, read: object) -> None:
    store = RunDir(tmp_path)
    store.write_spec(spec)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"old": 1}\n')
    assert "is damaged" in refused(read, store)  # type: ignore[arg-type]
    (tmp_path / "spec.yaml").write_text("model: m\n")
    assert "has run directory format 1" in refused(read, store)  # type: ignore[arg-type]
