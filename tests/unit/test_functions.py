"""Functions that a spec names by import path: found, checked, or refused with what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import refused
from support.fakes import BASE, setup_of

import raymask
from raymask.config import make_spec
from raymask.core.functions import get_function, is_import_path
from raymask.core.masking.samplers import SAMPLERS
from raymask.core.recipe import resolve
from raymask.report.summary import load_summary
from raymask.runs.run_dir import RunDir, open_run

MODULE = """
import torch

NUMBER = 3

def halved(scores, k, exponent, num_votes):
    return lambda scores, rng: scores * (0.5 + torch.rand(scores.shape, generator=rng))

def revived(scores, k, exponent, num_votes):
    return lambda scores, rng: scores + torch.rand(scores.shape, generator=rng)

def squared(weight, calibration):
    return weight.float() ** 2

def divided(weight, calibration):
    return weight.float() / (1 // 0)

def same(shapes, density):
    return {(name,): density for name in shapes}

def last(evaluations, keep):
    return sorted(evaluations, key=lambda evaluation: -evaluation.candidate.index)[:keep]
"""
OWN = {
    "mask": {"score": "own_masks:squared", "allocation": "own_masks:same"},
    "candidates": {"sampler": "own_masks:halved", "count": 3},
    "select": {"rule": "own_masks:last"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules in it."""
    (tmp_path / "own_masks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_masks", "broken"):
        sys.modules.pop(name, None)


def test_a_spec_names_functions_of_a_module_in_the_current_folder() -> None:
    recipe = resolve(make_spec(BASE | OWN))
    own = sys.modules["own_masks"]
    assert recipe.method.scorer is own.squared
    assert recipe.method.allocation is own.same
    assert recipe.method.sampler is own.halved
    assert recipe.select is own.last
    assert recipe.spec.import_paths == {
        "mask.allocation": "own_masks:same",
        "mask.score": "own_masks:squared",
        "candidates.sampler": "own_masks:halved",
        "select.rule": "own_masks:last",
    }


def test_functions_of_one_s_own_draw_masks_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8))
    options: dict[str, Any] = {"density": 0.25, "seed": 1, "include": ["*.weight"]}
    mask = raymask.draw_mask(module, **options, sampler="own_masks:halved", allocation="own_masks:same")
    assert int(mask["0.weight"].sum()) == 16
    with pytest.raises(ValueError, match="there is no module 'nowhere', neither installed nor in the current folder"):
        raymask.draw_mask(module, **options, sampler="nowhere:halved")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("votes", "no sampler is called 'votes'; known are voting, random, and one of your own as module:function"),
        ("own masks:f", "no sampler is called 'own masks:f'; known are voting, random, and one"),
        ("nowhere:f", "there is no module 'nowhere', neither installed nor in the current folder"),
        ("own_masks.inner:f", "there is no module 'own_masks.inner', neither installed nor in the current folder"),
        ("own_masks:f", "module 'own_masks' has no 'f'"),
        ("__main__:f", "workers cannot import '__main__': put 'f' into a file of its own, and name that"),
        ("own_masks:NUMBER", "'NUMBER' of module 'own_masks' is no function but 3"),
    ],
)
def test_a_name_that_is_no_function_s_is_told_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        get_function(SAMPLERS, name, "sampler")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import absent_package", "ModuleNotFoundError: No module named 'absent_package'"),
        ("import torch\ntorch.nothing", "AttributeError: module 'torch' has no attribute 'nothing'"),
        ("def f(:", "SyntaxError: "),
    ],
)
def test_a_module_that_fails_is_told_apart_from_one_that_is_not_there(folder: Path, code: str, message: str) -> None:
    (folder / "broken.py").write_text(code)
    with pytest.raises(ValueError, match=f"^importing 'broken' fails: {message}"):
        get_function(SAMPLERS, "broken:f", "sampler")


def test_a_spec_lists_every_function_that_cannot_be_imported_with_its_key() -> None:
    sections = {"mask": {"score": "nowhere:f", "allocation": "own_masks:g"}, "select": {"rule": "best:h"}}
    lines = refused(make_spec, BASE | sections).splitlines()
    assert lines == [
        "spec:",
        "  - mask.allocation: module 'own_masks' has no 'g' (it is 'own_masks:g')",
        "  - mask.score: there is no module 'nowhere', neither installed nor in the current folder (it is 'nowhere:f')",
        "  - select.rule: there is no module 'best', neither installed nor in the current folder (it is 'best:h')",
    ]


@pytest.mark.parametrize("name", ["mine:f", "my_package.samplers:gumbel", "_a.b1:C"])
def test_an_import_path_is_one(name: str) -> None:
    assert is_import_path(name)


@pytest.mark.parametrize("name", ["voting", "n:4", "mine:", ":f", "a:b:c", "a b:c", "1a:f", "a..b:c", "a:f.g"])
def test_what_is_no_import_path_is_none(name: str) -> None:
    assert not is_import_path(name)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"candidates": {"sampler": "own_masks:revived", "count": 3}},
            "candidates.sampler: own_masks:revived breaks a rule. A score of 0 must stay 0, or what is pruned comes",
        ),
        ({"mask": {"score": "own_masks:divided"}}, "mask.score: own_masks:divided fails with ZeroDivisionError: "),
    ],
)
def test_a_function_that_breaks_a_rule_is_refused_before_any_work(sections: dict[str, Any], message: str) -> None:
    assert refused(setup_of, **sections).startswith(message)


def test_functions_that_keep_the_rules_are_taken() -> None:
    assert setup_of(**OWN).recipe.spec.select.rule == "own_masks:last"


def test_a_run_is_reported_where_its_module_is_not(folder: Path) -> None:
    with open_run(RunDir("run"), make_spec(BASE | OWN)):
        pass
    (folder / "own_masks.py").unlink()
    del sys.modules["own_masks"]
    assert RunDir("run").read_spec().mask.score == "own_masks:squared"
    assert load_summary(RunDir("run")).spec.candidates.sampler == "own_masks:halved"
    assert "own_masks" not in sys.modules
