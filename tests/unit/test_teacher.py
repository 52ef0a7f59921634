"""Teacher outputs cached for the next candidates of a level."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raymask.train.teacher import MAX_CACHE_BYTES, Teacher, cache_bytes, layer_outputs

SIZE = 4 * (2 + 2 * 3 + 5)  # bytes of one batch's outputs below


class Dense(torch.nn.Module):
    """Counts its calls and returns other numbers at each."""

    calls = 0

    def forward(self, batch):
        self.calls += 1
        value = float(batch) + self.calls / 1000
        return SimpleNamespace(
            logits=torch.full((2,), value),
            hidden_states=(torch.full((3,), value),) * 2,
            attentions=(torch.full((5,), value), None),  # the second layer has no attention
        )


def outputs_of(teacher, order, batches=4, cache=True):
    teacher.start(order, cache=cache)
    return [float(teacher(batch=batch).logits[0]) for batch in range(batches)]


def test_the_next_candidate_gets_the_outputs_that_the_first_one_got():
    module = Dense()
    teacher = Teacher(module)
    first = outputs_of(teacher, "level 1")
    assert outputs_of(teacher, "level 1") == first
    assert module.calls == 4


def test_another_level_computes_anew_and_drops_the_cache_of_the_last():
    teacher = Teacher(Dense())
    first = outputs_of(teacher, "level 1")
    outputs_of(teacher, "level 2", batches=1)
    assert len(teacher.cached) == 1
    assert outputs_of(teacher, "level 1") != first


def test_a_candidate_that_failed_in_between_leaves_no_gap():
    module = Dense()
    teacher = Teacher(module)
    outputs_of(teacher, "level 1", batches=2)
    first = outputs_of(teacher, "level 1")
    assert outputs_of(teacher, "level 1") == first
    assert module.calls == 4


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (SIZE - 1, 0), (SIZE, 1), (2 * SIZE + 1, 2), (9 * SIZE, 4)])
def test_the_cache_takes_no_more_memory_than_allowed(room, kept):
    module = Dense()
    teacher = Teacher(module, room)
    outputs_of(teacher, "level 1")
    outputs_of(teacher, "level 1")
    assert len(teacher.cached) == kept
    assert module.calls == 4 + (4 - kept)


def test_nothing_is_cached_where_nobody_else_comes():
    teacher = Teacher(Dense())
    outputs_of(teacher, "fine-tuning", cache=False)
    assert teacher.cached == []


def test_outputs_are_rounded_under_autocast_whether_cached_or_not():
    for cache in (True, False):
        teacher = Teacher(Dense()).start("level 1", cache=cache)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = teacher(batch=1)
        assert {tensor.dtype for tensor in outputs.tensors()} == {torch.bfloat16}
        assert {tensor.dtype for tensor in teacher.start("other", cache=cache)(batch=1).tensors()} == {torch.float32}


def test_the_memory_asked_for_is_that_of_the_outputs_up_to_a_bound():
    config = SimpleNamespace(num_hidden_layers=2, hidden_size=8, num_attention_heads=3)
    lengths = np.array([4, 6])
    assert cache_bytes(10, lengths, config) == 4 * (10 * 5 * 8 * 3 + 10 * 26 * 3 * 2)
    assert cache_bytes(0, lengths, config) == 0
    assert cache_bytes(10**9, lengths, config) == cache_bytes(10, lengths, SimpleNamespace()) == MAX_CACHE_BYTES


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        ({"hidden_states": (1, 2), "attentions": (3, 4)}, ["hidden_states", "attentions"]),
        ({"hidden_states": (1, 2), "attentions": (None,)}, ["hidden_states"]),
        ({"hidden_states": (1, 2)}, ["hidden_states"]),
        (
            {"encoder_hidden_states": (1,), "decoder_hidden_states": (1,), "cross_attentions": (2,)},
            ["encoder_hidden_states", "decoder_hidden_states", "cross_attentions"],
        ),
    ],
)
def test_layers_are_distilled_as_far_as_a_model_has_them(outputs, names):
    assert list(layer_outputs(SimpleNamespace(**outputs))) == names


def test_a_model_without_hidden_states_cannot_be_distilled():
    with pytest.raises(ValueError, match="the model returns no hidden states to distil"):
        layer_outputs(SimpleNamespace(attentions=(1,)))
