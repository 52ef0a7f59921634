"""The sparse format: bit for bit the model, and as small as stated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.builders import DECODERS, FAMILIES, refused, tiny_selected
from torch import Tensor, nn

import raymask
from raymask.api import draw_mask
from raymask.export.formats import export_run
from raymask.export.selected import logits, read_selected
from raymask.export.sparse import SPARSE, SparseLinear, load_sparse, save, write_sparse
from raymask.runs.run_dir import RunDir
from raymask.train.model import state_tensors


def whole(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint would hold, tied weights under all their names."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("family", [*FAMILIES, *DECODERS])
def test_every_family_comes_back_with_the_same_weights_and_outputs(family: str, tmp_path: Path) -> None:
    selected = tiny_selected(family)
    lines = write_sparse(selected, tmp_path)
    assert "are the original's, bit for bit" in lines[2]
    found = load_sparse(tmp_path)
    assert whole(found).keys() == whole(selected.module).keys()
    for name, tensor in whole(selected.module).items():
        assert torch.equal(whole(found)[name], tensor), name
    assert state_tensors(found).keys() == state_tensors(selected.module).keys()  # what was tied still is
    assert not found.training
    assert type(found) is type(selected.module)
    rows = selected.rows()
    assert torch.allclose(logits(found, rows), logits(selected.module, rows), atol=1e-6)

    fast = load_sparse(tmp_path, csr=True)
    assert sum(isinstance(layer, SparseLinear) for layer in fast.modules()) == len(selected.mask)
    assert torch.allclose(logits(fast, rows), logits(selected.module, rows), atol=1e-5)


def test_a_decoder_still_generates_and_trains_on(tmp_path: Path) -> None:
    selected = tiny_selected("gpt2")
    write_sparse(selected, tmp_path)
    found: Any = load_sparse(tmp_path)
    assert found.lm_head.weight is found.transformer.wte.weight
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(found.generate(ids, max_new_tokens=4), selected.module.generate(ids, max_new_tokens=4))  # type: ignore[operator]
    found(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


@pytest.mark.parametrize("density", [0.0625, 0.5])
def test_fp16_rounds_all_weights_and_says_what_that_does_to_outputs(tmp_path: Path, density: float) -> None:
    selected = tiny_selected(density=density)
    lines = write_sparse(selected, tmp_path, values="fp16")
    found = state_tensors(load_sparse(tmp_path))
    for name, tensor in selected.tensors().items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.half().float()), name
    rows = selected.rows()
    strayed = (logits(load_sparse(tmp_path), rows) - logits(selected.module, rows)).abs().max()
    assert f"rounded to fp16; its outputs on 8 rows of random words differ by {strayed:.1g} at most" in lines[2]
    stored = load_file(tmp_path / SPARSE)
    assert {str(tensor.dtype) for name, tensor in stored.items() if ":" not in name or name.endswith(":values")} == {
        "torch.float16"
    }
    code = "gaps" if density < 0.125 else "bits"
    assert all(f"{name}:{code}" in stored for name in selected.mask)


def test_fp16_is_refused_where_it_has_no_such_numbers_or_saves_nothing(tmp_path: Path) -> None:
    selected = tiny_selected()
    with torch.no_grad():
        selected.module.get_parameter("classifier.bias")[0] = 1e5
    said = refused(write_sparse, selected, tmp_path, values="fp16")
    assert said == "--values: classifier.bias has a weight of 1e+05, and fp16 ends at 65504: leave out --values fp16"
    selected.module.bfloat16()
    assert "already take two bytes each" in refused(write_sparse, selected, tmp_path, values="fp16")


def test_bf16_comes_back_as_bf16_and_has_no_csr(tmp_path: Path) -> None:
    selected = tiny_selected(dtype="bfloat16")
    write_sparse(selected, tmp_path)
    found = state_tensors(load_sparse(tmp_path))
    for name, tensor in selected.tensors().items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name
    assert "is bfloat16; CSR weights must be float32" in refused(load_sparse, tmp_path, csr=True)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(("density", "exact", "fp16"), [(1 / 16, 10, 20), (1 / 100, 60, 120)])
def test_real_matrices_take_as_little_room_as_is_promised(
    minilm: Path, tmp_path: Path, allocation: str, density: float, exact: float, fp16: float
) -> None:
    from transformers import AutoModel

    module = AutoModel.from_pretrained(minilm)
    mask = draw_mask(module, density, allocation=allocation)
    dense = 4 * sum(kept.numel() for kept in mask.values())
    weights = {name: module.get_parameter(name).detach() for name in mask}
    assert dense / save(tmp_path / "exact", weights, mask, "") >= exact
    assert dense / save(tmp_path / "fp16", {name: each.half() for name, each in weights.items()}, mask, "") >= fp16
    assert (tmp_path / "fp16").stat().st_size < (tmp_path / "exact").stat().st_size < dense / exact


def test_sizes_that_are_printed_are_those_of_the_file(tmp_path: Path) -> None:
    selected = tiny_selected()
    lines = write_sparse(selected, tmp_path)
    size = (tmp_path / SPARSE).stat().st_size
    dense = 4 * sum(tensor.numel() for tensor in selected.tensors().values())
    assert lines[0].startswith(f"{SPARSE}: {size / 1e6:.3f} MB, {dense / size:.1f}x smaller than dense fp32")
    stored = load_file(tmp_path / SPARSE)
    pruned = sum(tensor.nbytes for name, tensor in stored.items() if ":" in name)
    total = 4 * sum(kept.numel() for kept in selected.mask.values())
    assert f"take {pruned / 1e6:.3f} MB of it, {total / pruned:.1f}x smaller than {total / 1e6:.3f} MB" in lines[1]


# --- what is not whole -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sparse(tiny_selected(), tmp_path)
    return tmp_path


def rewritten(path: Path, head: dict[str, str], **tensors: Tensor) -> None:
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path) | tensors, path, metadata=old | head)


def test_a_flipped_bit_is_found(folder: Path) -> None:
    data = bytearray((folder / SPARSE).read_bytes())
    for place in (len(data) - 1, len(data) // 2):
        spoilt = data.copy()
        spoilt[place] ^= 1
        (folder / SPARSE).write_bytes(spoilt)
        said = refused(load_sparse, folder)
        assert said == f"{folder / SPARSE}: is damaged (its hash differs); write it again with `raymask export`"


def test_a_file_that_is_cut_off_is_said(folder: Path) -> None:
    (folder / SPARSE).write_bytes((folder / SPARSE).read_bytes()[:-1])
    assert f"{folder / SPARSE}: is damaged (" in refused(load_sparse, folder)


def test_other_shapes_or_another_kind_are_found(folder: Path) -> None:
    with safe_open(folder / SPARSE, "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
    name = next(iter(shapes))
    rewritten(folder / SPARSE, {"shapes": json.dumps(shapes | {name: [1, 256]})})
    assert "its hash differs" in refused(load_sparse, folder)
    rewritten(folder / SPARSE, {"shapes": json.dumps(shapes)})
    load_sparse(folder)
    rewritten(folder / SPARSE, {"kind": "causal-lm"})
    assert "its hash differs" in refused(load_sparse, folder)


def test_what_is_no_sparse_checkpoint_is_said(folder: Path) -> None:
    rewritten(folder / SPARSE, {"format": "pt"})
    assert "has a format that this version of raymask does not read" in refused(load_sparse, folder)
    (folder / SPARSE).unlink()
    said = f"{folder / SPARSE}: there is no such file; `raymask export RUN --to sparse` writes it"
    assert refused(load_sparse, folder) == said


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 3), ("intermediate_size", 48)])
def test_a_configuration_that_is_another_model_s_is_said(folder: Path, key: str, value: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert f"{folder}: {SPARSE} is undamaged, but does not load as a model: " in refused(load_sparse, folder)


def test_what_does_not_come_back_the_same_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymask.export.sparse.decode", lambda code, codes: torch.arange((codes != 255).sum()))
    assert "differs from the original when it is loaded again" in refused(write_sparse, tiny_selected(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("raymask.export.sparse.logits", lambda module, rows: torch.rand(8, 2))
    assert "outputs of the loaded model differ by" in refused(write_sparse, tiny_selected(), tmp_path)


def test_a_run_is_exported_and_loaded_without_it(finished: Path, tmp_path: Path) -> None:
    assert export_run(finished, "sparse", tmp_path / "out")[-1] == f"Everything is in {tmp_path / 'out'}"
    found, selected = raymask.load_sparse(tmp_path / "out"), read_selected(RunDir(finished))
    assert all(torch.equal(tensor, whole(selected.module)[name]) for name, tensor in whole(found).items())
    assert selected.module.config.id2label == found.config.id2label == {0: "negative", 1: "positive"}  # type: ignore[union-attr]
    assert (tmp_path / "out" / "tokenizer.json").exists()
