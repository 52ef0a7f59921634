"""README, docs/ and jobs/: what they say is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support import documents
from support.builders import reviews, tiny_model, write_table
from support.cli import typed
from support.documents import block, section, table_rows
from support.paths import ROOT
from support.specs import SEARCH
from transformers import AutoModelForSequenceClassification

from raymask.config import UniqueKeys, load_spec, make_spec, parse_spec
from raymask.core.presets import PRESETS
from raymask.core.spec import GLUE, Spec
from raymask.driver.search import search
from raymask.tune.space import load_space

DOCS = ROOT / "docs"
COMMANDS = (
    "search",
    "tune",
    "check",
    "audit",
    "show",
    "compare",
    "eval",
    "export",
    "bench",
    "submit",
    "jobs",
    "status",
    "logs",
    "stop",
    "fetch",
)
IDS = {
    "install-and-search": ("README.md", "bash"),
    "install-and-test": ("README.md", "bash"),
    "faults": ("README.md", "bash"),
    "spec-small": ("docs/spec.md", "yaml"),
    "spec-own-files": ("README.md", "yaml"),
    "space": ("docs/ray-tune.md", "yaml"),
    "python-search": ("README.md", "python"),
    "python-pieces": ("docs/python-api.md", "python"),
    "python-load-sparse": ("docs/export.md", "python"),
    "python-own-functions": ("docs/extending.md", "python"),
    "spec-own-functions": ("docs/extending.md", "yaml"),
    "python-testing": ("docs/extending.md", "python"),
    "python-tune": ("docs/ray-tune.md", "python"),
    "cluster-commands": ("docs/cluster.md", "bash"),
    "masks-examples": ("docs/spec.md", "text"),
    "memory-keys": ("docs/large-models.md", "text"),
    "file-tree": ("docs/architecture.md", "text"),
}
"""Page and language of every code block that a test reads or runs, by its id."""
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


def fields(section: type[BaseModel], path: str = "") -> dict[str, Any]:
    """The field of every dotted key of the spec that is no section itself."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields(kind, f"{path}{name}.")
        else:
            found[f"{path}{name}"] = field
    return found


def key_table() -> dict[str, list[str]]:
    """The cells of every row of the table of keys, by key."""
    rows = {cells[0].strip("`"): cells for cells in table_rows(section(DOCS / "spec.md", "## All keys"))}
    assert all(len(cells) == 3 for cells in rows.values())
    return rows


def test_every_id_is_that_of_a_block() -> None:
    found = documents.blocks()
    assert {name: (str(path.relative_to(ROOT)), language) for name, (path, language, _) in found.items()} == IDS
    assert documents.num_ids() == len(IDS)


def test_the_readme_is_short() -> None:
    assert len(documents.read(documents.README).splitlines()) < 200


@pytest.mark.parametrize("path", documents.DOCS, ids=lambda path: path.stem)
def test_every_page_opens_with_a_sentence_after_its_title(path: Path) -> None:
    title, blank, first, *_ = documents.read(path).splitlines()
    assert re.match(r"# \S", title)
    assert blank == ""
    assert re.match(r"[A-Z].*\w", first), first
    paragraph = documents.read(path).split("\n\n")[1]
    assert paragraph.rstrip()[-1] in ".?", paragraph


@pytest.mark.parametrize(
    "path", [*documents.PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda path: path.stem
)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for link in documents.links(path):
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        assert there.is_relative_to(ROOT), link
        if anchor:
            assert anchor in documents.anchors(there), link


def test_the_readme_links_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in documents.links(documents.README)}
    assert {f"docs/{path.name}" for path in documents.DOCS} <= linked


def test_ci_runs_the_commands_to_the_letter() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    for name, command in (
        ("install-and-search", "pip install -e . && raymask search"),
        ("install-and-test", "pip install -e '.[test]' && pytest -n 2"),
        ("faults", "pytest -n 2 -m faults"),
    ):
        assert block(name, "bash") == f"{command}\n"
        assert f'step "{command}"\n' in gate


def test_the_file_tree_is_the_real_one() -> None:
    tree = block("file-tree", "text")
    named = set(re.findall(r"^(?:  )?([a-z_]+(?:\.py|/))", tree, re.MULTILINE)) - {"raymask/"}
    top = {f"{name}/" for name in ("jobs", "cluster", "docs", "tests")}
    inside = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "raymask").iterdir()
        if path.name not in ("__init__.py", "__pycache__", "quickstart.yaml", "py.typed")
    }
    assert named == top | inside


def test_the_file_tree_names_every_module_of_every_folder() -> None:
    described = re.split(r"^ *([a-z_]+(?:\.py|/)) ", block("file-tree", "text"), flags=re.MULTILINE)[1:]
    for folder, text in zip(described[::2], described[1::2], strict=True):
        [path] = [
            path for path in (ROOT / "raymask" / folder, ROOT / "raymask" / "core" / folder) if path.exists()
        ] or [None]
        if path is not None and path.is_dir():
            modules = {module.stem for module in path.glob("*.py")} - {"__init__"}
            assert modules <= set(re.findall(r"\w+", text)), folder


def test_the_small_spec_is_one() -> None:
    text = block("spec-small", "yaml")
    assert len(text.splitlines()) == 5
    spec = parse_spec(text)
    assert (spec.candidates.count, spec.workers.gpus) == (16, 0.5)


def test_a_classifier_and_rows_of_one_s_own_are_pruned_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = block("spec-own-files", "yaml")
    names = {0: "refund", 1: "praise"}
    tiny_model(tmp_path / "tickets", id2label=names, label2id={name: number for number, name in names.items()})
    for split, count in (("train", 200), ("test", 60)):
        messages, labels = reviews(count, seed=count)
        write_table(tmp_path / f"{split}.csv", {"message": messages, "queue": [names[label] for label in labels]})
    monkeypatch.chdir(tmp_path)
    quick = ["candidates.count=1", "early_eval.epochs=0.5", "finetune.epochs=1", "imp.epochs=1"]
    result = search(parse_spec(text, quick), "runs/tickets", in_process=True)
    assert [row.sparsity["prunable"] for row in result.models] == pytest.approx([0, 0.9, 0.9], abs=0.01)
    exported = AutoModelForSequenceClassification.from_pretrained("runs/tickets/export")
    assert exported.config.id2label == names


def test_functions_of_one_s_own_draw_the_masks_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docs say: a module in the current folder, checked, and named by a spec."""
    (tmp_path / "my_masks.py").write_text(block("python-own-functions", "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {}
    exec(block("python-testing", "python"), names)  # noqa: S102 - our own
    assert all(int(mask.sum()) == mask.numel() // 16 for mask in names["mask"].values())
    draws: list[int] = []

    def gumbel(scores: Any, k: int, exponent: float, num_votes: int) -> Any:
        draws.append(k)
        return own_gumbel(scores, k, exponent, num_votes)

    own_gumbel = names["my_masks"].gumbel
    monkeypatch.setattr(names["my_masks"], "gumbel", gumbel)
    own = yaml.safe_load(block("spec-own-functions", "yaml"))
    spec = make_spec(SEARCH | own | {"levels": [0.5], "candidates": SEARCH["candidates"] | own["candidates"]})
    draws.clear()
    result = search(spec, "run", in_process=True)
    [level] = result.levels
    assert (level.num_evaluated, level.num_failed) == (3, 0)
    assert 0 < max(draws) < 0.5 * level.num_prunable
    del sys.modules["my_masks"]


def test_the_masks_in_the_docs_are_masks() -> None:
    lines = block("masks-examples", "text").splitlines()
    assert len(lines) == 3
    assert all(
        "mask" in parse_spec(f"model: m\ntask: glue/mrpc\nlevels: [0.5]\n{line}").model_fields_set for line in lines
    )


def test_the_keys_that_save_memory_are_keys() -> None:
    spec = parse_spec(block("memory-keys", "text") + "task: glue/mrpc")
    assert (spec.model.dtype, spec.optimizer.name, spec.gradient_checkpointing) == ("bf16", "adafactor", True)
    plain = parse_spec("model: m\ntask: glue/mrpc")
    assert (plain.model.dtype, plain.optimizer.name, plain.gradient_checkpointing) == ("fp32", "adamw", False)


def test_the_space_in_the_docs_is_one(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(block("space", "yaml"))
    space = load_space(tmp_path / "space.yaml", {"model": "m", "task": "glue/mrpc"})
    assert set(space) == {"candidates.exponent", "candidates.count", "candidates.sampling_ratios"}


def test_every_key_of_a_spec_is_explained_and_no_other() -> None:
    rows = key_table()
    assert list(rows) == list(dict.fromkeys(rows)) != []
    assert rows.keys() == fields(Spec).keys() | {"preset"}
    assert all(explained for _, explained, _ in rows.values())
    assert all(f"`{name}`" in rows["preset"][1] for name in PRESETS)


def test_the_defaults_in_the_docs_are_the_real_ones() -> None:
    """A cell has a default as YAML; without one, the key is required or nothing is set."""
    of_levels = Spec.model_fields["levels"].get_default(call_default_factory=True).sparsities
    wrong = {}
    for key, field in fields(Spec).items():
        cell = key_table()[key][2]
        default = of_levels if key == "levels.sparsities" else field.get_default(call_default_factory=True)
        if not cell:
            shown = None
            default = None if field.is_required() else default
        else:
            assert re.fullmatch(r"`[^`]+`", cell), key
            shown = yaml.load(cell.strip("`"), UniqueKeys)  # noqa: S506 - a SafeLoader
        if isinstance(default, tuple):
            default = list(default)
        if (shown, type(shown)) != (default, type(default)):
            wrong[key] = shown, default
    assert wrong == {}
    assert key_table()["preset"][2] == ""


def test_every_symptom_in_the_docs_is_a_message_of_ours() -> None:
    """Or of torch's."""
    table = documents.read(DOCS / "troubleshooting.md")
    symptoms = [symptom for line in table.splitlines() for symptom in re.findall(r"^\| [^|`]*`([^`]+)`", line)]
    code = "".join(path.read_text() for path in (ROOT / "raymask").rglob("*.py"))
    code = re.sub(r'"\n\s*f?"', "", code)
    parts = [part.strip() for symptom in symptoms for part in re.split(r"\.\.\.|\d+", symptom)]
    unknown = {part for part in parts if part and part not in code}
    assert len(symptoms) > 5
    assert unknown == {"CUDA out of memory"}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_is_a_spec_that_says_what_it_is_for(path: Path) -> None:
    load_spec(path)
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("size", ["16x", "100x"])
@pytest.mark.parametrize("task", GLUE)
def test_bert_base_jobs_take_every_glue_task(task: str, size: str) -> None:
    spec = load_spec(ROOT / "jobs" / f"bert-base-{size}.yaml", [f"task=glue/{task}"])
    assert 1 - spec.levels.densities()[-1] == pytest.approx({"16x": 15 / 16, "100x": 0.99}[size])


def test_the_commands_in_the_docs_and_in_jobs_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*JOBS, *(ROOT / "jobs" / "spaces").glob("*.yaml"), *(ROOT / "cluster").rglob("README.md")]
    text = documents.joined() + "".join(path.read_text() for path in files)
    help_texts: dict[str, str] = {}
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    for command, options in re.findall(rf"raymask ({'|'.join(COMMANDS)})\b([^\n`]*)", text):
        if command not in help_texts:
            help_texts[command] = typed(command, "--help").stdout
        for option in re.findall(r" (--[a-z-]+)", options.split("#")[0]):
            assert option in help_texts[command], (command, option)
    assert set(help_texts) == set(COMMANDS)
