"""Exports: what was selected, with no file overwritten or unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import refused, reviews, tiny_model, write_table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import raymask
from raymask.core.masking.masks import digest, pack_bits
from raymask.export import formats
from raymask.export.formats import MARK, export_run
from raymask.export.selected import read_selected
from raymask.runs.run_dir import MASK, MODEL, RunDir, bits_to_tensors, tensors_to_bits


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def listed(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_selected_model_is_read_from_the_export_alone(finished: Path, tmp_path: Path) -> None:
    for name in ("spec.yaml", "result.json", "export"):
        source = finished / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    selected = read_selected(RunDir(tmp_path))
    plain = AutoModelForSequenceClassification.from_pretrained(finished / "export")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(selected.module.state_dict()[name], tensor), name
    assert not selected.module.training
    last = selected.result.levels[-1]
    assert digest(pack_bits(selected.mask)) == last.digest
    assert sum(int(kept.sum()) for kept in selected.mask.values()) == last.num_kept
    assert selected.tokenizer("a good film")["input_ids"] == AutoTokenizer.from_pretrained(finished / "export")(
        "a good film"
    )["input_ids"]  # fmt: skip
    assert set(selected.files) == {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json"}


def test_mask_bits_in_a_file_are_the_bits() -> None:
    mask = {"a": torch.rand(3, 7) < 0.5, "b": torch.ones(1, 1, dtype=torch.bool), "c": torch.zeros(0, 4) > 0}
    bits = pack_bits(mask)
    again = tensors_to_bits(bits_to_tensors(bits))
    assert (again.index, digest(again)) == (bits.index, digest(bits))
    assert np.array_equal(again.buffer, bits.buffer)


def test_hf_is_the_checkpoint_again(finished: Path, tmp_path: Path) -> None:
    lines = export_run(finished, "hf", tmp_path / "out")
    assert listed(tmp_path / "out") == listed(finished / "export") | {MARK}
    for name in listed(finished / "export"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / "export" / name).read_bytes(), name
    result = read_selected(RunDir(finished)).result
    assert json.loads((tmp_path / "out" / MARK).read_text())["mask"] == result.levels[-1].digest
    assert lines[0].startswith("model.safetensors: 0.095 MB, 1.0x smaller than dense fp32, 0.091 MB;")
    assert lines[1].startswith("Checked: transformers loads the same tensors. Of 16,384 weights")
    assert lines[2] == f"Everything is in {tmp_path / 'out'}"


def test_a_model_with_code_of_its_own_is_exported_where_that_may_run(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model")
    code = "from transformers import BertConfig, BertForSequenceClassification as Bert\n\n\n"
    code += "class OwnConfig(BertConfig):\n    model_type = 'own'\n\n\nclass Own(Bert):\n    config_class = OwnConfig\n"
    (source / "own.py").write_text(code)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    texts, labels = reviews(80)
    train, report = (str(write_table(tmp_path / f"{name}.csv", {"text": texts, "label": labels})) for name in "ab")
    spec = {
        "model": {"name": str(source), "trust_remote_code": True},
        "task": {"train": train, "test": report, "text": "text", "label": "label"},
        "levels": [0.5],
        "candidates": {"count": 0},
        "dense": {"epochs": 0.5},
        "finetune": {"epochs": 0.5},
        "distill": False,
    }
    raymask.search(spec, tmp_path / "run", in_process=True)
    export_run(tmp_path / "run", "hf")
    export_run(tmp_path / "run", "sparse")
    folder = tmp_path / "run" / "export-sparse"
    assert type(raymask.load_sparse(folder, trust_remote_code=True)).__name__ == "Own"
    said = refused(raymask.load_sparse, folder)
    assert "contains custom code" in said
    assert said.endswith("; trust_remote_code=True allows its own code")


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_without_out_it_goes_into_the_run_and_replaces_what_was_there(copy: Path) -> None:
    for _ in range(2):
        assert export_run(copy, "hf")[-1] == f"Everything is in {copy / 'export-hf'}"
        (copy / "export-hf" / "old").touch()
    assert export_run(copy, "hf")
    assert not (copy / "export-hf" / "old").exists()
    assert RunDir(copy).read_result() is not None


def test_a_run_in_an_object_store_is_read_and_written_there(copy: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(copy), "/bucket/run", recursive=True)
    try:
        lines = export_run("memory://bucket/run", "hf")
        assert lines[-1] == "Everything is in memory://bucket/run/export-hf"
        assert memory.cat("/bucket/run/export-hf/model.safetensors") == (copy / "export" / MODEL).read_bytes()
        assert memory.exists(f"/bucket/run/export-hf/{MARK}")
        assert export_run("memory://bucket/run", "hf") == lines
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name", ["claims", "beats", "lock", "thesis.part"])
def test_names_whose_contents_would_go_unseen_are_refused(finished: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("mine")
    said = refused(export_run, finished, "hf", tmp_path / name)
    assert said == f"--out: raymask reserves the name {name}: choose another"
    assert (tmp_path / name / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_no_export_is_not_overwritten(finished: Path, tmp_path: Path, there: str) -> None:
    kept = tmp_path / "out" / "thesis.tex" if there == "folder" else tmp_path / "out"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    said = refused(export_run, finished, "hf", tmp_path / "out")
    assert said == f"{tmp_path / 'out'}: exists already and is not an export of raymask: choose another with --out"
    assert kept.read_text() == "mine"


def test_what_fails_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(selected: object, folder: Path) -> list[str]:
        (folder / "half").touch()
        raise ZeroDivisionError

    monkeypatch.setitem(formats.FORMATS, "broken", write)
    with pytest.raises(ZeroDivisionError):
        export_run(finished, "broken", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(export_run, finished, "hf", tmp_path / "file" / "out")
    assert said.startswith(f"{tmp_path / 'file' / 'out'}: cannot be written: ")
    assert said.endswith("or choose another location with --out")


def test_a_run_that_cannot_be_written_is_said_with_the_option_that_export_has(copy: Path) -> None:
    (copy / "export-hf.part").touch()
    said = refused(export_run, copy, "hf")
    assert said.startswith(f"{copy}/export-hf: cannot be written: File exists. ")
    assert said.endswith(", or choose another location with --out")


def test_a_checkpoint_that_reads_otherwise_is_not_left(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymask.export.hf.load_exported", lambda *where: read_selected(RunDir(finished)).module.half())
    said = refused(export_run, finished, "hf", tmp_path / "out")
    assert "transformers loads other tensors than were written" in said
    assert list(tmp_path.iterdir()) == []


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_unfinished_search_is_said(copy: Path) -> None:
    (copy / "result.json").unlink()
    said = f"{copy}: the search is not finished; `raymask search` with the same spec continues it"
    assert refused(export_run, copy, "hf") == said
    with RunDir(copy).storage.lock():
        assert refused(export_run, copy, "hf") == f"{copy}: the search is not finished; wait for it"


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    assert "is not a run directory" in refused(export_run, tmp_path, "hf")


def flip_mask(export: Path) -> None:
    bits = load_file(export / MASK)
    name = next(name for name in bits if ":" not in name)
    bits[name] = ~bits[name]
    save_file(bits, export / MASK)


def lose_weight(export: Path) -> None:
    tensors = load_file(export / MODEL)
    del tensors["classifier.weight"]
    save_file(tensors, export / MODEL, metadata={"format": "pt"})


def swap_mask(export: Path) -> None:
    """One more is pruned, which is no longer the mask that was selected."""
    bits = load_file(export / MASK)
    name = next(name for name in bits if ":" not in name)
    bits[name].zero_()
    save_file(bits, export / MASK)
    tensors = load_file(export / MODEL)
    tensors[name].zero_()
    save_file(tensors, export / MODEL, metadata={"format": "pt"})


def flip_bit(export: Path) -> None:
    data = bytearray((export / MODEL).read_bytes())
    data[-1] ^= 1
    (export / MODEL).write_bytes(data)


@pytest.mark.parametrize("spoil", [flip_bit, flip_mask, lose_weight])
def test_an_export_that_is_not_what_was_written_is_said(copy: Path, spoil: Callable[[Path], object]) -> None:
    spoil(copy / "export")
    said = refused(export_run, copy, "hf")
    assert "safetensors differs from that of the file that was written" in said


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda export: (export / MODEL).write_bytes((export / MODEL).read_bytes()[:-9]), "incomplete metadata"),
        (lambda export: (export / "config.json").unlink(), "config"),
        (lambda export: (export / "tokenizer.json").write_text("{"), ""),
        (flip_mask, "is not zero where the mask prunes it"),
        (lose_weight, "it has no weights for classifier.weight"),
        (swap_mask, "its mask is not the selected one"),
    ],
    ids=["cut off", "no config", "no tokenizer", "another mask's weights", "a weight lost", "another mask"],
)
def test_a_damaged_export_is_said(copy: Path, spoil: Callable[[Path], object], cause: str) -> None:
    """Also of a search that did not note hashes yet."""
    store = RunDir(copy)
    result = store.read_result()
    assert result is not None
    assert set(result.files) == {MODEL, MASK}
    store.write_result(result.model_copy(update={"files": {}}))
    spoil(copy / "export")
    said = refused(export_run, copy, "hf")
    assert said.startswith(f"{copy / 'export'}: is damaged (")
    assert cause in said
    assert said.endswith("Delete it, and `raymask search` with the same spec and --run writes it again")


def test_an_export_that_is_gone_is_said(copy: Path) -> None:
    shutil.rmtree(copy / "export")
    said = f"{copy / 'export'}: does not exist; `raymask search` with the same spec and --run writes it again"
    assert refused(export_run, copy, "hf") == said


def test_unknown_formats_and_options_are_said_before_anything_is_read() -> None:
    assert refused(export_run, "nowhere", "zip").startswith("--to: unknown format 'zip'; known are hf")
    assert refused(export_run, "nowhere", "hf", int8=True) == "--int8: --to hf has no options"
    assert "must be a local folder, not a URI" in refused(export_run, "nowhere", "hf", "s3://bucket/out")
