"""Records come back from JSON exactly as they went."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raymask.core.masking.noise import Noise
from raymask.core.records import (
    Candidate,
    ConfidenceInterval,
    EvalPoint,
    Evaluation,
    FinetuneResult,
    LevelRecord,
    ModelMetrics,
    Phase,
    Record,
    Result,
    Span,
    TrainConfig,
)

numbers = st.floats()  # infinities, NaN, subnormals and -0.0 included
counts = st.integers(0, 2**63 - 1)
words = st.text(st.characters(codec="utf-8"), max_size=12)

noises = st.builds(Noise, exponent=numbers, sampling_ratio=numbers)
candidates = st.builds(Candidate, level=counts, index=counts, seed=counts, density=numbers, noise=st.none() | noises)
points = st.builds(EvalPoint, step=counts, loss=numbers, metric=numbers)
curves = st.lists(points, max_size=3).map(tuple)
evaluations = st.builds(
    Evaluation,
    candidate=candidates,
    score=st.none() | numbers,
    curve=curves,
    row_losses=st.binary(max_size=40),
    distance=st.none() | numbers,
    digest=st.none() | words,
    started=numbers,
    seconds=numbers,
    worker=words,
    error=st.none() | words,
)
configs = st.builds(
    TrainConfig,
    epochs=numbers,
    batch_size=counts,
    learning_rate=numbers,
    schedule=words,
    warmup=numbers,
    distill=st.booleans(),
)
finetunings = st.builds(FinetuneResult, curve=curves, best=counts, started=numbers, seconds=numbers, worker=words)
intervals = st.builds(ConfidenceInterval, mean=numbers, low=numbers, high=numbers)
levels = st.builds(
    LevelRecord,
    level=counts,
    density=numbers,
    num_kept=counts,
    num_prunable=counts,
    winner=evaluations,
    num_evaluated=counts,
    num_failed=counts,
    gain=st.none() | intervals,
    finetune_result=finetunings,
    test_metrics=st.dictionaries(words, numbers, max_size=3),
    digest=words,
    parent_key=words,
    data_fingerprint=words,
    files=st.dictionaries(words, words, max_size=3),
)
models = st.builds(
    ModelMetrics,
    name=words,
    test_metrics=st.dictionaries(words, numbers, max_size=3),
    intervals=st.dictionaries(words, intervals, max_size=3),
    sparsity=st.dictionaries(words, numbers, max_size=3),
)
spans = st.builds(
    Span, worker=words, phase=st.sampled_from(get_args(Phase)), level=counts, started=numbers, seconds=numbers
)
results = st.builds(
    Result,
    run=words,
    model=words,
    task=words,
    metrics=st.lists(words, max_size=2).map(tuple),
    models=st.lists(models, max_size=3).map(tuple),
    sizes=st.dictionaries(words, counts, max_size=3),
    gain=st.none() | intervals,
    levels=st.lists(levels, max_size=1).map(tuple),
    baseline_levels=st.lists(levels, max_size=1).map(tuple),
    seconds=st.dictionaries(words, numbers, max_size=3),
    rows_scored=st.tuples(st.integers(), st.integers()),
    timeline=st.lists(spans, max_size=2).map(tuple),
    export=words,
)
RECORDS = {
    Candidate: candidates,
    EvalPoint: points,
    Evaluation: evaluations,
    TrainConfig: configs,
    FinetuneResult: finetunings,
    ConfidenceInterval: intervals,
    LevelRecord: levels,
    ModelMetrics: models,
    Span: spans,
    Result: results,
}
every_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)


def test_every_record_is_tested_here():
    assert set(RECORDS) == {kind for kind in Record.__subclasses__() if kind.__module__ == Record.__module__}


@every_record
@given(data=st.data())
@settings(max_examples=40)
def test_a_record_reads_back_from_json_exactly(record, data):
    value = data.draw(RECORDS[record])
    text = value.model_dump_json()
    again = record.model_validate_json(text)
    assert repr(again) == repr(value)  # tells -0.0 from 0.0, and takes NaN for NaN
    assert again.model_dump_json() == text
    assert "\n" not in text  # one line of the journal


@every_record
@given(data=st.data())
@settings(max_examples=5)
def test_a_record_cannot_be_changed(record, data):
    value = data.draw(RECORDS[record])
    for field in record.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, field, getattr(value, field))


@every_record
@given(data=st.data())
@settings(max_examples=5)
def test_a_record_refuses_what_it_does_not_know(record, data):
    fields = data.draw(RECORDS[record]).model_dump()
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        record.model_validate({**fields, "color": "blue"})


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"exponent": 5.0, "sampling_ratio": 1e-4, "color": "blue"}, "noise.color\n  Unexpected keyword argument"),
        ({"exponent": 5.0}, "noise.sampling_ratio\n  Field required"),
        ({"exponent": "five", "sampling_ratio": 1e-4}, "noise.exponent\n  Input should be a valid number"),
    ],
)
def test_a_candidate_refuses_noise_that_is_none(noise, message):
    with pytest.raises(ValidationError, match=message):
        Candidate.model_validate({"level": 1, "index": 1, "seed": 0, "density": 0.5, "noise": noise})


@pytest.mark.parametrize("number", [5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2, float("inf"), float("-inf")])
def test_extreme_numbers_survive_json(number):
    again = EvalPoint.model_validate_json(EvalPoint(step=0, loss=number, metric=0.0).model_dump_json())
    assert np.float64(again.loss).tobytes() == np.float64(number).tobytes()


@given(st.lists(st.floats(width=32), max_size=20))
def test_row_losses_survive_json_bit_by_bit(losses):
    candidate = Candidate(level=1, index=0, seed=0, density=0.5)
    rows = np.array(losses, np.float32)
    evaluation = Evaluation(candidate=candidate, row_losses=rows.tobytes())
    again = Evaluation.model_validate_json(evaluation.model_dump_json()).losses()
    assert again.dtype == np.float32
    assert again.tobytes() == rows.tobytes()


def test_a_candidate_without_noise_is_the_magnitude_mask():
    magnitude = Candidate(level=1, index=0, seed=0, density=0.5)
    random = Candidate(level=1, index=4, seed=0, density=0.5, noise=Noise(exponent=5, sampling_ratio=1e-4))
    assert (magnitude.is_magnitude, magnitude.name) == (True, "magnitude mask")
    assert (random.is_magnitude, random.name) == (False, "candidate 4")


def test_an_evaluation_with_an_error_is_not_ok():
    candidate = Candidate(level=1, index=0, seed=0, density=0.5)
    assert Evaluation(candidate=candidate, score=1.0).ok
    assert not Evaluation(candidate=candidate, error="").ok


def test_the_best_evaluation_of_a_fine_tuning_is_the_one_whose_weights_are_kept():
    curve = tuple(EvalPoint(step=step, loss=1.0 / step, metric=0.5) for step in (1, 2, 3))
    assert FinetuneResult(curve=curve, best=1, started=0.0, seconds=1.0, worker="").best_eval.step == 2


@given(levels, st.integers(0, 10**12), st.integers(0, 10**12))
@settings(max_examples=10)
def test_a_level_s_sparsity_is_the_share_of_prunable_weights_that_is_gone(level, kept, gone):
    level = level.model_copy(update={"num_kept": kept, "num_prunable": kept + gone})
    assert level.sparsity == pytest.approx(gone / (kept + gone) if kept + gone else 0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "noise"),
    [(-1.0, 1.0, True), (0.0, 1.0, True), (-1.0, 0.0, True), (0.1, 1.0, False), (-1.0, -0.1, False)],
)
def test_an_interval_is_within_noise_when_it_contains_zero(low, high, noise):
    assert ConfidenceInterval(mean=(low + high) / 2, low=low, high=high).within_noise is noise
