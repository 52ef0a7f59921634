"""Specs from YAML and overrides, and messages about mistakes in them."""

import os
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raymask.config import load_spec, make_spec, parse_spec
from raymask.core.errors import UserError
from raymask.core.masking.allocations import ALLOCATIONS
from raymask.core.masking.samplers import SAMPLERS
from raymask.core.masking.scorers import SCORERS
from raymask.core.presets import MUTABLE_KEYS, PRESETS, fingerprint
from raymask.core.selection import SELECTIONS
from raymask.core.spec import GLUE, Candidates, Levels, MaskOptions, Select, Spec, Workers

TWO_LINES = "model: bert-base-uncased\ntask: glue/mrpc\n"
FIVE_LINES = """\
model: ./minilm
task: {train: train.csv, test: test.csv, text: sentence}
levels: [0.5, 0.9]
candidates: {count: 16}
seed: 7
"""


def refusal(text, *overrides):
    """The message of the UserError that `text` is refused with."""
    with pytest.raises(UserError) as raised:
        parse_spec(dedent(text), overrides, source="job.yaml")
    return str(raised.value)


def with_line(line):
    """The message about one more line under a spec that is otherwise right."""
    return refusal(TWO_LINES + line)


def test_two_lines_are_a_spec_with_the_method_s_defaults():
    spec = parse_spec(TWO_LINES)
    assert (spec.model.name, spec.task.name) == ("bert-base-uncased", "glue/mrpc")
    assert spec == Spec(model={"name": "bert-base-uncased"}, task={"name": "glue/mrpc"})
    assert spec.levels.densities() == pytest.approx((0.46, 0.17, 0.08, 0.0625))
    assert (spec.candidates.count, spec.candidates.exponent) == (8, 5.0)
    assert spec.candidates.sampling_ratios == (5e-5, 1e-4, 8e-5, 3e-4)
    assert (spec.early_eval.learning_rate, spec.early_eval.score_window, spec.early_eval.score) == (2e-4, 10, "loss")
    assert (spec.finetune.epochs, spec.finetune.learning_rate) == (10.0, 5e-5)
    assert spec.distill


def test_five_lines_set_what_they_say():
    spec = parse_spec(FIVE_LINES)
    assert (spec.model.name, spec.task.name) == ("./minilm", None)
    assert (spec.task.train, spec.task.test, spec.task.text) == ("train.csv", "test.csv", ("sentence",))
    assert spec.levels.sparsities == (0.5, 0.9)
    assert (spec.candidates.count, spec.seed) == (16, 7)


@pytest.mark.parametrize("path", ["str", "Path"])
def test_a_file_is_read_as_utf_8(tmp_path, path):
    file = tmp_path / "spec.yaml"
    file.write_text(TWO_LINES.replace("bert-base-uncased", "модель"), encoding="utf-8")
    assert load_spec(str(file) if path == "str" else file, ["seed=3"]) == Spec(
        model={"name": "модель"}, task={"name": "glue/mrpc"}, seed=3
    )


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("model: m", "model: {name: m}"),
        ("task: glue/sst2", "task: {name: glue/sst2}"),
        ("levels: [0.5, 0.9]", "levels: {sparsities: [0.5, 0.9]}"),
        ("levels: 0.9", "levels: [0.9]"),
        ("task: {train: a, test: b, text: col}", "task: {train: a, test: b, text: [col]}"),
    ],
)
def test_a_short_form_means_its_long_form(short, long):
    base = {"model": "m", "task": "glue/mrpc"}
    assert make_spec({**base, **yaml.safe_load(short)}) == make_spec({**base, **yaml.safe_load(long)})


@pytest.mark.parametrize("name", [f"glue/{task}" for task in GLUE])
def test_every_glue_task_is_known(name):
    assert make_spec({"model": "m", "task": name}).task.name == name


def test_a_mistake_is_told_of_the_file_and_of_what_was_set_over_it(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(TWO_LINES)
    with pytest.raises(UserError) as caught:
        load_spec(file, ["seed=3", "candidates.cout=2"])
    assert str(caught.value) == (
        f"{file} --set seed=3 --set candidates.cout=2: candidates.cout: there is no such key; did you mean count?"
    )


def test_two_columns_are_a_pair_of_sentences():
    assert parse_spec("model: m\ntask: {train: a, test: b, text: [s1, s2]}").task.text == ("s1", "s2")


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.e-4", "0.0002", ".2e-3", "+2e-4", "200e-6"])
def test_a_number_in_scientific_notation_is_a_number(text):
    spec = parse_spec(TWO_LINES + f"early_eval: {{learning_rate: {text}}}", [f"finetune.learning_rate={text}"])
    assert spec.early_eval.learning_rate == pytest.approx(2e-4)
    assert spec.finetune.learning_rate == pytest.approx(2e-4)


def test_names_that_only_resemble_numbers_stay_names():
    spec = parse_spec("model: {name: ./3e, revision: '2e4', include: [1.2.3, -]}\ntask: glue/mrpc")
    assert (spec.model.name, spec.model.revision, spec.model.include) == ("./3e", "2e4", ("1.2.3", "-"))


def test_a_final_sparsity_is_reached_along_the_schedule():
    spec = parse_spec(TWO_LINES + "levels: {sparsity: 0.8, steps: 2, schedule: linear}")
    assert spec.levels.densities() == pytest.approx((0.6, 0.2))
    assert Levels(sparsity=0.9).densities() == pytest.approx((0.47969, 0.2125, 0.11406, 0.1), abs=1e-4)


@given(st.lists(st.integers(1, 999), min_size=1, max_size=8, unique=True).map(sorted))
def test_densities_decrease_as_sparsities_increase(permille):
    densities = Levels(sparsities=[part / 1000 for part in permille]).densities()
    assert list(densities) == sorted(set(densities), reverse=True)
    assert all(0 < density < 1 for density in densities)


# Presets


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_spec_beneath_two_lines(preset):
    spec = parse_spec(TWO_LINES + f"preset: {preset}")
    for section, settings in PRESETS[preset].items():
        found = spec.model_dump(mode="json")[section]
        assert found == settings or {key: found[key] for key in settings} == settings


def test_the_paper_s_preset_scores_by_the_metric_at_full_precision():
    spec = parse_spec(TWO_LINES + "preset: paper")
    assert (spec.early_eval.score, spec.precision, spec.imp.epochs) == ("metric", "fp32", 15.0)


def test_a_spec_s_own_keys_win_over_its_preset_one_by_one():
    spec = parse_spec(TWO_LINES + "preset: paper\nearly_eval: {score_window: 3}\ndistill: false")
    assert (spec.early_eval.score_window, spec.early_eval.score, spec.distill) == (3, "metric", False)


@pytest.mark.parametrize("levels", ["[0.5]", "{sparsity: 0.5, steps: 1}"])
def test_a_spec_s_own_levels_replace_the_preset_s_whole(levels):
    spec = parse_spec(TWO_LINES + f"preset: paper\nlevels: {levels}")
    assert spec.levels.densities() == (0.5,)


def test_a_preset_is_left_as_it_was():
    before = repr(PRESETS)
    parse_spec(
        TWO_LINES + "preset: paper\nearly_eval: {score_window: 3}", ["candidates.count=2", "levels.sparsity=0.5"]
    )
    assert repr(PRESETS) == before


# --set


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("candidates.count=4", "candidates", "count", 4),
        ("candidates.sampling_ratios=[1e-5, 1e-4]", "candidates", "sampling_ratios", (1e-5, 1e-4)),
        ("imp.run=false", "imp", "run", False),
        ("model.revision=main", "model", "revision", "main"),
        ("model.revision=", "model", "revision", None),
        ("model.revision=a=b", "model", "revision", "a=b"),
        (" workers.gpus =0.5", "workers", "gpus", 0.5),
        ("task.validation_rows=50", "task", "validation_rows", 50),
    ],
)
def test_an_override_sets_one_key_and_no_other(override, section, key, value):
    spec = parse_spec(TWO_LINES, [override])
    assert getattr(getattr(spec, section), key) == value
    plain = parse_spec(TWO_LINES).model_dump()
    plain[section][key] = value
    assert spec.model_dump() == plain


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier():
    spec = parse_spec(FIVE_LINES, ["seed=8", "candidates.count=1", "candidates.count=2"])
    assert (spec.seed, spec.candidates.count) == (8, 2)


def test_an_override_inside_a_short_form_keeps_the_name():
    spec = parse_spec(TWO_LINES, ["model.exclude=[lm_head.*]", "task.max_length=64"])
    assert (spec.model.name, spec.model.exclude) == ("bert-base-uncased", ("lm_head.*",))
    assert (spec.task.name, spec.task.max_length) == ("glue/mrpc", 64)


def test_an_override_can_be_a_short_form_or_a_preset():
    spec = parse_spec("seed: 1", ["model=m", "task=glue/rte", "levels=[0.3]", "preset=paper"])
    assert (spec.model.name, spec.task.name, spec.early_eval.score) == ("m", "glue/rte", "metric")
    assert spec.levels.densities() == (0.7,)


def test_an_override_of_the_sparsity_replaces_a_list_of_levels():
    assert parse_spec(FIVE_LINES, ["levels.sparsity=0.5", "levels.steps=1"]).levels.densities() == (0.5,)


@pytest.mark.parametrize("override", ["seed", "=3", ".seed=3", "candidates.=3", "candidates..count=3", ""])
def test_an_override_that_is_no_assignment_is_refused(override):
    message = refusal(TWO_LINES, override)
    assert message == f"--set {override}: write it as key=value, for instance --set candidates.count=16"


def test_an_override_whose_value_is_not_yaml_is_refused():
    assert refusal(TWO_LINES, "seed=[1") == "--set seed=[1: the value is not valid YAML"
    assert "is not valid YAML" in refusal(TWO_LINES, "candidates={count: 1, count: 2}")


def test_an_override_of_an_unknown_key_gets_the_same_suggestion_as_in_the_file():
    assert refusal(TWO_LINES, "candidates.cuont=3") == (
        "job.yaml: candidates.cuont: there is no such key; did you mean count?"
    )


def test_an_override_inside_a_section_that_is_none_does_not_hide_the_mistake():
    assert "workers" in refusal(TWO_LINES + "workers: 4", "workers.cpus=2")


# Mistakes


def test_every_mistake_is_reported_at_once():
    message = refusal(
        """\
        model: m
        task: glue/nope
        levels: [0.9, 0.5]
        candidates: {cuont: 3, exponent: 0}
        distill: perhaps
        sede: 3
        """
    )
    first, *mistakes = message.split("\n  - ")
    assert first.strip() == "job.yaml:"
    assert [mistake.split(":")[0] for mistake in mistakes] == [
        "task",
        "levels",
        "candidates.exponent",
        "candidates.cuont",
        "distill",
        "sede",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sede: 3", "sede: there is no such key; did you mean seed?"),
        ("presett: paper", "presett: there is no such key; did you mean preset?"),
        ("early_eval: {learning_rat: 1}", "early_eval.learning_rat: there is no such key; did you mean learning_rate?"),
        ("imp: {zzz: 1}", "imp.zzz: there is no such key; known are run, epochs"),
    ],
)
def test_an_unknown_key_is_answered_with_the_likely_or_the_known_ones(line, message):
    assert with_line(line) == f"job.yaml: {message}"


def test_an_unknown_key_inside_a_long_form_is_answered_alike():
    message = refusal("model: {name: m, revison: main}\ntask: glue/mrpc")
    assert message == "job.yaml: model.revison: there is no such key; did you mean revision?"


@pytest.mark.parametrize(
    ("line", "where", "what", "given"),
    [
        ("seed: many", "seed", "valid integer", "'many'"),
        ("seed: -1", "seed", "greater than or equal to 0", "-1"),
        ("seed: 9223372036854775808", "seed", "less than 9223372036854775808", "9223372036854775808"),
        ("candidates: {count: 1.5}", "candidates.count", "valid integer", "1.5"),
        ("candidates: {exponent: 1001}", "candidates.exponent", "less than or equal to 1000", "1001"),
        ("candidates: {exponent: .inf}", "candidates.exponent", "finite number", "inf"),
        ("early_eval: {epochs: .nan}", "early_eval.epochs", "finite number", "nan"),
        ("early_eval: {score: f1}", "early_eval.score", "'loss', 'metric' or 'agreement'", "'f1'"),
        ("imp: {run: perhaps}", "imp.run", "valid boolean", "'perhaps'"),
        ("precision: fp8", "precision", "'auto', 'fp32' or 'bf16'", "'fp8'"),
        ("dense: {data_parallel: 6}", "dense.data_parallel", "must be 1, 2, 4, 8 or a higher power of two, not 6", "6"),
        ("finetune: {data_parallel: 0}", "finetune.data_parallel", "greater than or equal to 1", "0"),
        ("workers: 4", "workers", "has keys of its own, count, cpus", "4"),
        ("levels: high", "levels", "a list of shares is wanted", "'high'"),
        ("levels: true", "levels", "a list of shares is wanted", "True"),
        ("levels: 1", "levels.sparsities.0", "less than 1", "1"),
        ("levels: [0.5, high]", "levels.sparsities.1", "valid number", "'high'"),
    ],
)
def test_a_wrong_value_is_answered_with_its_place_the_rule_and_the_value(line, where, what, given):
    message = with_line(line)
    assert message.startswith(f"job.yaml: {where}: ")
    assert what in message
    assert message.endswith(f"(it is {given})")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mask: {score: wanda}", "mask.score: wanda needs a model that lies on one device"),
        ("optimizer: {name: adafactor}", "optimizer.name: only the state of adamw can be sharded"),
        (
            "finetune: {data_parallel: 2}",
            "dense.data_parallel and finetune.data_parallel: FSDP splits each batch itself, leave them at 1",
        ),
    ],
)
def test_what_fsdp_cannot_do_is_refused(line, said):
    assert f"workers.fsdp: 2 does not go with other settings; {said}" in with_line(f"{line}\nworkers: {{fsdp: 2}}")


def test_fsdp_processes_do_not_share_a_gpu():
    assert "workers.gpus: give each FSDP process whole GPUs, or 0" in with_line("workers: {fsdp: 2, gpus: 0.5}")


@pytest.mark.parametrize(
    ("sparsity", "rule"),
    [("0", "greater than 0"), ("1", "less than 1"), ("1.5", "less than 1"), ("-0.5", "greater than 0")],
)
def test_a_sparsity_that_leaves_everything_or_nothing_is_refused(sparsity, rule):
    assert f"levels.sparsities.0: input should be {rule}" in with_line(f"levels: [{sparsity}]")
    assert f"levels.sparsity: input should be {rule}" in with_line(f"levels: {{sparsity: {sparsity}}}")


@pytest.mark.parametrize("levels", ["[0.9, 0.5]", "[0.5, 0.5]", "[0.1, 0.9, 0.8]"])
def test_sparsities_that_do_not_increase_are_refused(levels):
    assert with_line(f"levels: {levels}") == (
        f"job.yaml: levels: sparsities must increase from level to level, not {levels}"
    )


def test_levels_are_given_in_exactly_one_way():
    message = "job.yaml: levels: give either sparsities, or sparsity (with steps and schedule)"
    assert with_line("levels: {sparsities: [0.5], sparsity: 0.9}") == message
    assert with_line("levels: {steps: 3}") == message
    assert with_line("levels: []") == "job.yaml: levels: at least one sparsity is needed"


# Weights in bf16


@pytest.mark.parametrize("lines", ["precision: fp32", "preset: paper"])
def test_weights_in_bf16_cannot_be_multiplied_in_fp32(lines):
    message = refusal("model: {name: m, dtype: bf16}\ntask: glue/mrpc\n" + lines)
    assert message == (
        "job.yaml: precision: fp32 needs weights in fp32, and model.dtype is bf16: take precision out, or set "
        "model.dtype to fp32"
    )


def test_weights_of_another_type_are_refused():
    assert refusal(TWO_LINES, "model.dtype=fp16") == (
        "job.yaml: model.dtype: input should be 'fp32' or 'bf16' (it is 'fp16')"
    )


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_weights_in_bf16_go_with_any_other_precision(precision):
    spec = parse_spec(TWO_LINES, ["model.dtype=bf16", f"precision={precision}"])
    assert (spec.model.dtype, parse_spec(TWO_LINES).model.dtype) == ("bf16", "fp32")


# Where sparsity goes


def test_a_mask_is_the_method_s_unless_something_else_is_asked_for():
    assert parse_spec(TWO_LINES).mask == MaskOptions(allocation="uniform", pattern="unstructured", score="magnitude")
    spec = parse_spec(TWO_LINES + "levels: [0.5, 0.75]\nmask: {pattern: n:4, score: wanda}")
    assert (spec.mask.allocation, spec.mask.pattern, spec.mask.score) == ("uniform", "n:4", "wanda")
    spec = parse_spec(TWO_LINES, ["mask.pattern=16x1", "mask.allocation=erk", "mask.score=saliency"])
    assert spec.mask == MaskOptions(allocation="erk", pattern="16x1", score="saliency")


def test_every_entry_of_the_tables_is_known():
    assert all(MaskOptions(allocation=name).allocation == name for name in ALLOCATIONS)
    assert all(MaskOptions(score=name).score == name for name in SCORERS)
    assert all(Candidates(sampler=name).sampler == name for name in SAMPLERS)
    assert all(Select(rule=name).rule == name for name in SELECTIONS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("allocation: erdos", "allocation: no allocation is called 'erdos'; known are uniform, erk, global"),
        ("score: taylor", "score: no score is called 'taylor'; known are magnitude, wanda, saliency"),
        ("pattern: 4by4", "pattern: no pattern is called '4by4'; known are unstructured, n:M such as n:4, and RxC"),
        ("pattern: '1:64'", "pattern: 1:64 is written n:64, and the levels say how many of 64 are kept: levels: ["),
    ],
)
def test_an_unknown_mask_is_answered_with_the_known_ones(keys, message):
    assert with_line(f"mask: {{{keys}}}").startswith(f"job.yaml: mask.{message}")


def test_an_unknown_sampler_or_rule_is_answered_with_the_known_ones():
    said = with_line("candidates: {sampler: gumbel}")
    assert said.startswith("job.yaml: candidates.sampler: no sampler is called 'gumbel'; known are voting, random")
    said = with_line("select: {rule: last}")
    assert said.startswith("job.yaml: select.rule: no rule is called 'last'; known are best, first")


@pytest.mark.parametrize(("written", "size", "level"), [("2:4", 4, "0.5"), ("1:4", 4, "0.75"), ("8:16", 16, "0.5")])
@pytest.mark.parametrize("quote", ["", "'"])  # to YAML a bare 2:4 is a number, of seconds
def test_a_pattern_with_its_n_is_answered_with_what_to_write(written, size, level, quote):
    assert with_line(f"mask: {{pattern: {quote}{written}{quote}}}").startswith(
        f"job.yaml: mask.pattern: {written} is written n:{size}, and the levels say how many of {size} are kept: "
        f"levels: [{level}]"
    )


@pytest.mark.parametrize(
    ("pattern", "levels", "sparsity", "left"),
    [("n:4", "[0.5, 0.9]", 0.9, 0.4), ("n:4", "[0.6]", 0.6, 1.6), ("n:8", "[0.5, 0.9375]", 0.9375, 0.5)],
)
def test_levels_that_leave_no_whole_number_of_a_group_are_refused(pattern, levels, sparsity, left):
    size = pattern.removeprefix("n:")
    assert with_line(f"mask: {{pattern: {pattern}}}\nlevels: {levels}") == (
        f"job.yaml: levels: a sparsity of {sparsity} keeps {left} of each {size}, and {pattern} needs a whole number, "
        f"1 at least: write every level as a multiple of 1/{size}"
    )


@pytest.mark.parametrize(("pattern", "levels"), [("n:4", "[0.25, 0.5, 0.75]"), ("n:10", "[0.1, 0.7, 0.9]")])
def test_levels_that_leave_whole_numbers_are_taken(pattern, levels):
    assert parse_spec(TWO_LINES + f"mask: {{pattern: {pattern}}}\nlevels: {levels}").mask.pattern == pattern


@pytest.mark.parametrize("allocation", sorted(set(ALLOCATIONS) - {"uniform"}))
def test_n_of_m_goes_with_uniform_alone_and_blocks_with_all(allocation):
    assert with_line(f"mask: {{pattern: n:4, allocation: {allocation}}}\nlevels: [0.5]") == (
        f"job.yaml: mask.allocation: n:4 keeps the same share everywhere: it goes with uniform, not with {allocation}"
    )
    assert parse_spec(TWO_LINES + f"mask: {{pattern: 4x4, allocation: {allocation}}}").mask.allocation == allocation


def test_missing_model_and_task_are_both_named():
    message = refusal("{}")
    assert "\n  - model: is missing" in message
    assert "\n  - task: is missing" in message
    assert refusal("model: m") == "job.yaml: task: is missing"


@pytest.mark.parametrize("name", ["''", "'  '"])
def test_an_empty_name_is_refused(name):
    assert "model.name: string should have at least 1 character" in refusal(f"model: {name}\ntask: glue/mrpc")


def test_an_unknown_task_is_answered_with_the_known_ones():
    message = refusal("model: m\ntask: glue/mprc")
    assert message.startswith("job.yaml: task: no task is called 'glue/mprc'; known are glue/cola, ")
    assert all(f"glue/{task}" in message for task in GLUE)


@pytest.mark.parametrize("extra", ["train: t.csv", "test: r.csv", "text: s", "metrics: [f1]"])
def test_a_task_with_a_name_brings_no_files_columns_or_metrics(extra):
    assert refusal(f"model: m\ntask: {{name: glue/mrpc, {extra}}}") == (
        "job.yaml: task: a task with a name brings its own files and columns: take out train, validation, "
        "test, text and metrics"
    )


@pytest.mark.parametrize("keys", ["", "train: a, test: b", "train: a, text: s", "test: b, text: s"])
def test_own_files_are_given_whole(keys):
    assert refusal(f"model: m\ntask: {{{keys}}}") == (
        "job.yaml: task: a task is either a name (glue/mrpc) or has the keys train, test and text"
    )


def test_three_columns_of_text_are_too_many():
    message = refusal("model: m\ntask: {train: a, test: b, text: [x, y, z]}")
    assert message.startswith("job.yaml: task.text: ")
    assert "at most 2 items" in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("kind: regression, metrics: [f1]", "a regression is measured by pearson and spearman"),
        ("metrics: [accuracy, pearson]", "a classification is measured by accuracy, f1 and matthews"),
    ],
)
def test_metrics_must_suit_the_kind_of_task(keys, message):
    text = f"model: m\ntask: {{train: a, test: b, text: s, {keys}}}"
    assert refusal(text) == f"job.yaml: task: {message}"


@pytest.mark.parametrize(("line", "positive"), [("yes please", "yes please"), ("1", "1"), ("'01'", "01"), ("-1", "-1")])
def test_the_positive_class_is_a_text_or_a_whole_number(line, positive):
    assert parse_spec(f"model: m\ntask: {{train: a, test: b, text: s, positive: {line}}}").task.positive == positive


@pytest.mark.parametrize("value", ["yes", "no", "true", "1.10"])
def test_a_positive_class_that_yaml_reads_otherwise_is_refused(value):
    message = refusal(f"model: m\ntask: {{train: a, test: b, text: s, positive: {value}}}")
    assert message.startswith(
        "job.yaml: task.positive: put the class in quotes: YAML reads yes and no as true and false"
    )


@pytest.mark.parametrize("keys", ["name: glue/mrpc", "train: a, test: b, text: s, kind: regression"])
def test_a_positive_class_goes_with_classes_of_own_files(keys):
    message = refusal(f"model: m\ntask: {{{keys}, positive: a}}")
    assert message == "job.yaml: task: positive goes with a classification of your own files: take it out"


def test_blanks_are_part_of_a_column_s_name():
    task = parse_spec("model: m\ntask: {train: a, test: b, text: ' text', label: 'the label '}").task
    assert (task.text, task.label) == ((" text",), "the label ")


@pytest.mark.parametrize("value", ["50%", "0,5"])
def test_levels_that_are_no_list_are_answered_with_one(value):
    message = refusal(TWO_LINES, f"levels={value}")
    assert message == f"job.yaml: levels: a list of shares is wanted, such as [0.5, 0.9] (it is '{value}')"


def test_a_section_that_is_no_mapping_is_answered_with_its_keys():
    assert with_line("mask: 4x4") == ("job.yaml: mask: has keys of its own, allocation, pattern, score (it is '4x4')")


@pytest.mark.parametrize(
    "keys",
    [
        "train: a.txt, test: b.txt",
        "train: a.csv, test: b.csv, text: body",
        "train: a.txt, test: b.txt, metrics: [perplexity]",
        "name: hub/Salesforce/wikitext:wikitext-2-raw-v1",
        "name: hub/stas/openwebtext-10k",
    ],
)
def test_a_causal_lm_reads_texts_of_files_and_of_the_hub(keys):
    assert parse_spec(f"model: m\ntask: {{kind: causal-lm, {keys}}}").task.kind == "causal-lm"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "kind: causal-lm",
            "a causal-lm is either a dataset (hub/Salesforce/wikitext:wikitext-2-raw-v1) or has the keys train and "
            "test",
        ),
        ("kind: causal-lm, train: a, test: b, text: [x, y]", "a causal-lm reads one column of text"),
        ("kind: causal-lm, train: a, test: b, metrics: [accuracy]", "a causal-lm is measured by perplexity"),
        (
            "train: a, test: b, text: s, metrics: [perplexity]",
            "a classification is measured by accuracy, f1 and matthews",
        ),
        (
            "kind: causal-lm, name: glue/mrpc",
            "a causal-lm reads a dataset of texts, such as hub/Salesforce/wikitext:wikitext-2-raw-v1, not 'glue/mrpc'",
        ),
        (
            "kind: causal-lm, name: 'hub/:raw'",
            "a causal-lm reads a dataset of texts, such as hub/Salesforce/wikitext:wikitext-2-raw-v1, not 'hub/:raw'",
        ),
        ("name: hub/a/b", "hub/a/b is a dataset of texts: set kind to causal-lm"),
        (
            "kind: causal-lm, name: hub/a/b, folder: f",
            "a dataset comes from the hub: take out folder, or give files as train and test",
        ),
        (
            "kind: causal-lm, name: hub/a/b, text: body",
            "a task with a name brings its own files and columns: take out train, validation, test, text and metrics",
        ),
    ],
)
def test_what_is_no_causal_lm_s_is_refused(keys, message):
    assert refusal(f"model: m\ntask: {{{keys}}}") == f"job.yaml: task: {message}"


def test_a_causal_lm_has_no_agreement():
    text = "model: m\ntask: {kind: causal-lm, train: a, test: b}\nearly_eval: {score: agreement}"
    assert refusal(text) == (
        "job.yaml: early_eval.score: agreement compares the probabilities of classes, a causal-lm has none: set it to "
        "loss or metric"
    )


def test_the_quickstart_is_whole_and_trained():
    assert parse_spec("model: quickstart\ntask: quickstart").task.name == "quickstart"
    together = "the quickstart's model and task go together: set both to 'quickstart', or neither"
    assert refusal("model: quickstart\ntask: glue/mrpc") == f"job.yaml: {together}"
    assert refusal("model: m\ntask: quickstart") == f"job.yaml: {together}"
    assert refusal("model: quickstart\ntask: quickstart\ndense: {epochs: 0}") == (
        "job.yaml: the quickstart's model is built untrained: dense.epochs must be more than 0"
    )
    assert refusal("model: quickstart\ntask: {name: quickstart, folder: data}") == (
        "job.yaml: task: the quickstart's task is generated: take out folder"
    )


@pytest.mark.parametrize(("preset", "shown"), [("papre", "'papre'"), ("3", "3"), ("[paper]", "['paper']")])
def test_an_unknown_preset_is_answered_with_the_known_ones(preset, shown):
    message = with_line(f"preset: {preset}")
    assert message == f"job.yaml: preset: there is no preset {shown}; known are {', '.join(PRESETS)}"


# Texts that are no spec at all


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "3", "null"])
def test_a_text_that_is_not_a_mapping_is_refused(text):
    message = refusal(text, "seed=3")
    assert message == "job.yaml: a spec is a mapping of keys to values, at least `model:` and `task:`"


@pytest.mark.parametrize(
    "text",
    [
        "model: [m\n",
        "model: m\n  task: x",
        "model: m\n\ttask: x",
        "model: *nowhere",
        "a: 1\n---\nb: 2",
        "model: \x00",
        "model: {{ name }}",  # a template that nobody filled in: a mapping as the key of a mapping
        "? [a, b]\n: c",
        "model: {name: m, revision: 2024-13-45}",  # looks like a date, is none
    ],
)
def test_a_text_that_is_not_yaml_is_refused(text):
    assert refusal(text).startswith("job.yaml: not valid YAML: ")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("model: a\ntask: b\nmodel: c", "model", 3),
        ("model: a\nearly_eval:\n  score_window: 1\n  score_window: 1", "score_window", 4),
    ],
)
def test_a_key_given_twice_is_refused_at_any_depth_with_its_line(text, key, line):
    message = refusal(text)
    assert message.startswith(f"job.yaml: not valid YAML: the key '{key}' is given twice")
    assert f"line {line}" in message


@pytest.mark.parametrize("key", ["3", "true", "null", "2.5"])
def test_a_key_that_is_no_text_is_refused(key):
    assert "keys should be strings" in with_line(f"{key}: x")


def test_anchors_and_merged_mappings_are_understood():
    text = TWO_LINES + "dense: &rate {learning_rate: 1e-5}\nfinetune: {<<: *rate, epochs: 2}\nearly_eval: *rate"
    spec = parse_spec(text)
    assert (spec.finetune.learning_rate, spec.finetune.epochs) == (1e-5, 2)
    assert spec.early_eval.learning_rate == 1e-5


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
    ],
)
def test_python_tags_are_refused_and_never_run(tmp_path, value):
    trap = tmp_path / "trap"
    value = value.format(trap)
    assert "could not determine a constructor for the tag" in refusal(f"model: {value}\ntask: glue/mrpc")
    assert "is not valid YAML" in refusal(TWO_LINES, f"model={value}")
    assert not trap.exists()


def test_a_missing_file_is_named_with_a_place_to_start_from(tmp_path):
    with pytest.raises(UserError) as raised:
        load_spec(tmp_path / "nope.yaml")
    assert (
        str(raised.value)
        == f"{tmp_path / 'nope.yaml'}: there is no such file; the repository's jobs/ has specs to start from"
    )


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: .*Is a directory"):
        load_spec(tmp_path)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "spec.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(UserError, match="cannot be read: 'utf-8' codec can't decode"):
        load_spec(tmp_path / "spec.yaml")


def test_a_message_begins_with_the_file_it_is_about(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text("model: m")
    with pytest.raises(UserError) as raised:
        load_spec(os.fspath(file))
    assert str(raised.value) == f"{file}: task: is missing"


# What a spec is once it is made


def test_a_spec_and_its_sections_cannot_be_changed():
    spec = parse_spec(TWO_LINES)
    with pytest.raises(ValidationError, match="frozen"):
        spec.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        spec.early_eval.score_window = 3


def test_a_spec_survives_yaml_and_json():
    spec = parse_spec(FIVE_LINES, ["early_eval.learning_rate=1e-20"])
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    assert parse_spec(yaml.safe_dump(spec.model_dump(mode="json"))) == spec


def test_the_fingerprint_is_flat_and_leaves_out_what_cannot_change_the_result():
    plain = fingerprint(parse_spec(TWO_LINES))
    assert plain["candidates.count"] == 8
    assert plain["model.name"] == "bert-base-uncased"
    assert not {".".join(path) for path in MUTABLE_KEYS} & set(plain)
    free = ["workers.count=3", "workers.timeout=5", "workers.max_retries=0"]
    assert fingerprint(parse_spec(TWO_LINES, free)) == plain
    changed = fingerprint(parse_spec(TWO_LINES, ["early_eval.score_window=3"]))
    assert {key for key in plain if plain[key] != changed[key]} == {"early_eval.score_window"}


@pytest.mark.parametrize(("cpus", "threads"), [(0.25, 1), (1, 1), (3.9, 3), (8, 8)])
def test_a_worker_has_as_many_threads_as_whole_cpus(cpus, threads):
    assert Workers(cpus=cpus).threads == threads


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("early_eval: {rungs: [0.5]}", "early_eval: rungs must increase and end at 1.0, not [0.5]"),
        ("early_eval: {rungs: [0.5, 0.5, 1.0]}", "early_eval: rungs must increase and end at 1.0, not [0.5, 0.5, 1.0]"),
        (
            "early_eval: {repeats: 2, score: metric}",
            "early_eval: repeats compares the losses on validation: set score to loss, not metric",
        ),
        (
            "candidates: {count: 2}\nselect: {keep: 4}",
            "select.keep: 4 is more than the 3 masks of a level (candidates.count and the magnitude mask)",
        ),
        ("select: {beam: true}", "select.beam: one mask makes no beam, set select.keep to 2 or more"),
    ],
)
def test_rungs_repeats_and_branches_that_make_no_sense_are_refused(line, said):
    assert with_line(line) == f"job.yaml: {said}"


def test_numbers_may_be_numpy_s_and_names_paths():
    plain = {"model": "m", "task": "glue/rte", "levels": [0.5, 0.75], "seed": 3, "finetune": {"batch_size": 8}}
    numpy = {"levels": np.array([0.5, 0.75]), "seed": np.int64(3), "finetune": {"batch_size": np.int32(8)}}
    assert make_spec(plain | numpy | {"model": Path("m")}) == make_spec(plain)
