"""The run directory's records: what is damaged is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.records import checkpoint, evaluation, write

from raymask.config import make_spec
from raymask.core.errors import UserError
from raymask.core.lineage import DENSE, IMP, SEARCH
from raymask.core.spec import Spec
from raymask.runs.run_dir import FORMAT, MASK, MODEL, RunDir, check_run, open_run


@pytest.fixture
def spec() -> Spec:
    return make_spec({"model": "quickstart", "task": "quickstart"})


@pytest.fixture
def store(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


# --- the journal -----------------------------------------------------------------------------------------------------


def test_the_journal_gives_back_what_was_appended(store: RunDir) -> None:
    assert store.evaluations(1) == []
    for index in range(3):
        store.append(evaluation(index))
    assert store.evaluations(1) == [evaluation(0), evaluation(1), evaluation(2)]
    assert store.evaluations(2) == []


@pytest.mark.parametrize("cut", [1, 2, 10, 40, 100])
def test_a_torn_last_line_is_passed_over_and_written_again_cleanly(store: RunDir, cut: int) -> None:
    store.append(evaluation(0))
    store.append(evaluation(1))
    journal = Path(store.level_uri(SEARCH, 1)).parent / "evaluations.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert store.evaluations(1) == [evaluation(0)]
    store.append(evaluation(2))
    assert store.evaluations(1) == [evaluation(0), evaluation(2)]


def test_a_damaged_line_that_is_not_the_last_is_an_error(store: RunDir) -> None:
    store.append(evaluation(0))
    store.append(evaluation(1))
    journal = Path(store.level_uri(SEARCH, 1)).parent / "evaluations.jsonl"
    journal.write_bytes(b"x" + journal.read_bytes())
    with pytest.raises(UserError, match=r"evaluations.jsonl: line 1 is damaged. Delete the file"):
        store.evaluations(1)


# --- levels ----------------------------------------------------------------------------------------------------------


def test_a_level_gives_back_what_was_written(store: RunDir) -> None:
    record = write(store)
    done = checkpoint()
    assert store.read_level(SEARCH, 1) == record
    assert sorted(record.files) == [
        "mask.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "test.safetensors",
    ]
    assert store.read_weights(SEARCH, 1).views()["a"].tolist() == [[1.0, 0.0, 2.0]]
    assert store.read_optimizer(SEARCH, 1).views()["step"].item() == 3.0
    bits = store.read_tensors(SEARCH, 1, MASK)
    assert np.unpackbits(bits["a"].numpy(), count=3).tolist() == [1, 0, 1]
    assert {name: tensor.tolist() for name, tensor in bits.items() if "shape" in name} == {
        "a:shape": [1, 3],
        "b:shape": [1],
    }
    assert np.array_equal(store.read_logits(SEARCH, 1), done.test_outputs)


def test_the_lineages_do_not_share_files(store: RunDir) -> None:
    paths = {store.level_uri(lineage, level) for lineage, level in [(DENSE, 0), (SEARCH, 0), (SEARCH, 1), (IMP, 1)]}
    assert len(paths) == 4


def test_a_level_without_its_record_is_not_done(store: RunDir) -> None:
    write(store)
    Path(store.level_uri(SEARCH, 1)).unlink()
    assert not store.has_level(SEARCH, 1)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (MODEL, lambda data: data[:-3]),
        (MODEL, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        (MODEL, lambda _: b""),
        (MASK, lambda data: data[:-1] + bytes([data[-1] ^ 64])),
    ],
    ids=["truncated", "flipped", "emptied", "mask flipped"],
)
def test_a_damaged_file_is_refused_by_its_hash(store: RunDir, name: str, damage: Callable[[bytes], bytes]) -> None:
    write(store)
    path = Path(store.level_uri(SEARCH, 1)).with_name(name)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{name}: is not what was written there .*Delete .*level.json"):
        store.read_tensors(SEARCH, 1, name)


@pytest.mark.parametrize(("name", "read"), [("level-1/level.json", "level"), ("result.json", "result")])
@pytest.mark.parametrize("content", ["{", ""])
def test_a_damaged_record_is_an_error_that_says_what_to_do(store: RunDir, name: str, read: str, content: str) -> None:
    write(store)
    (Path(store.uri) / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: is damaged. Delete it"):
        store.read_level(SEARCH, 1) if read == "level" else store.read_result()


@pytest.mark.parametrize("digit", ["score", "sha256"])
def test_a_flipped_bit_in_a_record_is_found_though_it_is_still_json(store: RunDir, digit: str) -> None:
    write(store)
    store.append(evaluation(1))
    for name, read in (("level.json", store.read_level), ("evaluations.jsonl", lambda *_: store.evaluations(1))):
        path = Path(store.level_uri(SEARCH, 1)).with_name(name)
        text = path.read_text()
        start = re.search(rf'"{digit}":\s*"?', text).end()
        place = next(at for at in range(start, len(text)) if text[at] in "2345678")
        path.write_text(text[:place] + str(int(text[place]) ^ 1) + text[place + 1 :])
        json.loads(path.read_text().splitlines()[0] if name.endswith("jsonl") else path.read_text())
        with pytest.raises(UserError, match=rf"{name}: .*is damaged. Delete"):
            read(SEARCH, 1)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_spec_is_kept_as_it_was_asked_for(tmp_path: Path, spec: Spec) -> None:
    with open_run(RunDir(tmp_path / "run"), spec) as store:
        assert store.read_spec() == spec


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, spec: Spec) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty and not a run directory"), open_run(RunDir(tmp_path), spec):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path: Path, spec: Spec) -> None:
    (tmp_path / "file").write_text("")
    for place, why in (("file", "is a file"), ("file/run", "cannot be written: Not a directory")):
        with pytest.raises(UserError, match=why), open_run(RunDir(tmp_path / place), spec):
            pass


@pytest.mark.parametrize("content", ["model: [", "- 1", "model: x\ntask: y\n", "!!python/object/apply:os.getcwd []"])
def test_a_damaged_spec_is_said(store: RunDir, spec: Spec, content: str) -> None:
    write(store, DENSE, 0)
    (Path(store.uri) / "spec.yaml").write_text(f"# raymask run directory, format {FORMAT}\n{content}")
    with pytest.raises(UserError, match=r"spec.yaml: is damaged"):
        check_run(store, spec)


def test_what_is_no_run_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: nothing is there"):
        RunDir(tmp_path / "none").read_spec()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is not a run directory: it has no spec\.yaml"):
        RunDir(tmp_path).read_spec()
    with pytest.raises(UserError, match=r"file: is a file, and a run directory is a folder"):
        RunDir(tmp_path / "file")


def test_every_start_is_noted_with_its_versions(store: RunDir) -> None:
    store.record_start(address=None)
    store.record_start(address="auto")
    starts = json.loads((Path(store.uri) / "env.json").read_text())
    assert [start["address"] for start in starts] == [None, "auto"]
    assert starts[0]["versions"]["torch"] == torch.__version__
    (Path(store.uri) / "env.json").write_text("[{")
    with pytest.raises(UserError, match=r"env.json: is damaged. Delete it"):
        store.record_start()


def test_what_a_user_may_want_elsewhere_has_every_export_and_no_tensors_to_go_on_from(tmp_path: Path) -> None:
    wanted = ["export/model.safetensors", "export-sparse/model.sparse.safetensors", "level-1/level.json", "report.html"]
    for name in (*wanted, "dense/model.safetensors", "level-1/optimizer.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert RunDir(tmp_path).downloadable_files() == sorted(wanted)
