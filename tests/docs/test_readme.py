"""Is what README and jobs/ say true?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from support.builders import reviews, tiny_model, write_table
from support.cli import typed
from transformers import AutoModelForSequenceClassification

from raymask.config import load_spec, parse_spec
from raymask.core.spec import GLUE, Spec
from raymask.driver.search import search
from raymask.report.terminal import Silent
from raymask.space import load_space

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
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
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def keys(section: type[BaseModel], path: str = "") -> set[str]:
    """Every dotted key of the spec that is no section itself."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= keys(kind, f"{path}{name}.")
        else:
            found.add(f"{path}{name}")
    return found


def test_ci_runs_the_commands_to_the_letter() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    for command in (
        "pip install -e . && raymask search",
        "pip install -e '.[test]' && pytest -n 2",
        "pytest -n 2 -m faults",
    ):
        assert f"```bash\n{command}\n```" in README
        assert f'step "{command}"\n' in gate


def test_the_file_tree_is_the_real_one() -> None:
    tree = README.split("## Where the code is")[1].split("```")[1]
    named = set(re.findall(r"^(?:  )?([a-z_]+(?:\.py|/))", tree, re.MULTILINE)) - {"raymask/"}
    top = {f"{name}/" for name in ("jobs", "cluster", "tests")}
    inside = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "raymask").iterdir()
        if path.name not in ("__init__.py", "__pycache__", "quickstart.yaml")
    }
    assert named == top | inside


def test_the_spec_in_the_readme_is_one() -> None:
    text, _, _ = blocks("yaml")
    assert len(text.splitlines()) == 5
    spec = parse_spec(text)
    assert (spec.candidates.count, spec.workers.gpus) == (16, 0.5)


def test_a_classifier_and_rows_of_one_s_own_are_pruned_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text, _ = blocks("yaml")
    names = {0: "refund", 1: "praise"}
    tiny_model(tmp_path / "tickets", id2label=names, label2id={name: number for number, name in names.items()})
    for split, count in (("train", 200), ("test", 60)):
        messages, labels = reviews(count, seed=count)
        write_table(tmp_path / f"{split}.csv", {"message": messages, "queue": [names[label] for label in labels]})
    monkeypatch.chdir(tmp_path)
    quick = ["candidates.count=1", "probe.epochs=0.5", "finetune.epochs=1", "imp.epochs=1"]
    result = search(parse_spec(text, quick), "runs/tickets", Silent(), in_process=True)
    assert [row.sparsity["prunable"] for row in result.rows] == pytest.approx([0, 0.9, 0.9], abs=0.01)
    exported = AutoModelForSequenceClassification.from_pretrained("runs/tickets/export")
    assert exported.config.id2label == names


def test_the_masks_in_the_readme_are_masks() -> None:
    lines = re.findall(r"^mask: .*", README, re.MULTILINE)
    assert len(lines) == 3
    assert all(
        "mask" in parse_spec(f"model: m\ntask: glue/mrpc\nlevels: [0.5]\n{line}").model_fields_set for line in lines
    )


def test_the_keys_that_save_memory_are_keys() -> None:
    section = README.split("## Models that do not fit")[1].split("\n## ")[0]
    spec = parse_spec(section.split("```text\n")[1].split("```")[0] + "task: glue/mrpc")
    assert (spec.model.dtype, spec.optimizer.name, spec.checkpointing) == ("bf16", "adafactor", True)
    plain = parse_spec("model: m\ntask: glue/mrpc")
    assert (plain.model.dtype, plain.optimizer.name, plain.checkpointing) == ("fp32", "adamw", False)


def test_the_space_in_the_readme_is_one(tmp_path: Path) -> None:
    _, _, text = blocks("yaml")
    (tmp_path / "space.yaml").write_text(text)
    space = load_space(tmp_path / "space.yaml", {"model": "m", "task": "glue/mrpc"})
    assert set(space) == {"candidates.exponent", "candidates.count", "candidates.ratios"}


def test_every_key_of_a_spec_is_explained() -> None:
    table = README.split("| key | what it is | default |")[1].split("\n\n")[0]
    for key in keys(Spec):
        section, _, name = key.rpartition(".")
        row = next((line for line in table.splitlines() if f"`{section or name}`" in line or f"`{key}`" in line), "")
        assert row, key
        assert not section or f"`{name}`" in row or f"`{key}`" in table, key


def test_the_defaults_in_the_readme_are_the_real_ones() -> None:
    spec = parse_spec("model: m\ntask: glue/mrpc")
    rows = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in README.splitlines() if line.startswith("| `")
    }

    def numbers(text: str) -> list[float]:
        return [float(part) for part in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)]

    dense, probe, finetune = spec.dense, spec.probe, spec.finetune
    assert numbers(rows["`levels`"]) == list(spec.levels.sparsities or ())
    assert rows["`mask`"] == ", ".join(spec.mask.model_dump().values())
    asked = spec.candidates
    assert rows["`candidates`"].startswith(f"{asked.sampler}; ")
    assert numbers(rows["`candidates`"]) == [asked.count, asked.exponent, *asked.ratios]
    assert numbers(rows["`dense`"]) == list(dense.model_dump().values())
    flat = probe.model_dump(exclude={"score", "rungs", "repeats"})
    assert numbers(rows["`probe`"]) == [*flat.values(), *probe.rungs, probe.repeats]
    assert rows["`select`"] == f"{spec.select.rule}, {spec.select.keep}, {str(spec.select.beam).lower()}"
    assert numbers(rows["`finetune`"]) == list(finetune.model_dump().values())
    assert numbers(rows["`workers`"]) == [
        spec.workers.cpus,
        spec.workers.deadline,
        spec.workers.retries,
        spec.workers.wait,
        spec.workers.gang,
    ]


def test_every_symptom_in_the_readme_is_a_message_of_ours() -> None:
    """Or of torch's."""
    table = README.split("## Troubleshooting")[1].split("\n## ")[0]
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


def test_the_commands_in_the_readme_and_in_jobs_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*JOBS, *(ROOT / "jobs" / "spaces").glob("*.yaml"), *(ROOT / "cluster").rglob("README.md")]
    text = README + "".join(path.read_text() for path in files)
    help_texts: dict[str, str] = {}
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    for command, options in re.findall(rf"raymask ({'|'.join(COMMANDS)})\b([^\n`]*)", text):
        if command not in help_texts:
            help_texts[command] = typed(command, "--help").stdout
        for option in re.findall(r" (--[a-z-]+)", options.split("#")[0]):
            assert option in help_texts[command], (command, option)
    assert set(help_texts) == set(COMMANDS)
