from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raymask.train.teacher import MEMORY, Teacher, memory

SIZE = 4 * (2 + 2 * 3 + 5)  # bytes of one answer below


class Dense(torch.nn.Module):
    """Counts its calls and answers each with other numbers."""

    calls = 0

    def forward(self, batch):
        self.calls += 1
        value = float(batch) + self.calls / 1000
        return SimpleNamespace(
            logits=torch.full((2,), value),
            hidden_states=(torch.full((3,), value),) * 2,
            attentions=(torch.full((5,), value),),
        )


def answers(teacher, order, batches=4, keep=True):
    teacher.begin(order, keep=keep)
    return [float(teacher(batch=batch).logits[0]) for batch in range(batches)]


def test_the_next_candidate_hears_what_the_first_one_heard():
    module = Dense()
    teacher = Teacher(module)
    first = answers(teacher, "level 1")
    assert answers(teacher, "level 1") == first
    assert module.calls == 4


def test_another_level_is_answered_anew_and_what_was_kept_of_the_last_is_gone():
    teacher = Teacher(Dense())
    first = answers(teacher, "level 1")
    answers(teacher, "level 2", batches=1)
    assert len(teacher.kept) == 1
    assert answers(teacher, "level 1") != first


def test_a_candidate_that_failed_in_between_leaves_no_gap():
    module = Dense()
    teacher = Teacher(module)
    answers(teacher, "level 1", batches=2)
    first = answers(teacher, "level 1")
    assert answers(teacher, "level 1") == first
    assert module.calls == 4


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (SIZE - 1, 0), (SIZE, 1), (2 * SIZE + 1, 2), (9 * SIZE, 4)])
def test_no_more_is_kept_than_memory_allows(room, kept):
    module = Dense()
    teacher = Teacher(module, room)
    answers(teacher, "level 1")
    answers(teacher, "level 1")
    assert len(teacher.kept) == kept
    assert module.calls == 4 + (4 - kept)


def test_nothing_is_kept_where_nobody_else_comes():
    teacher = Teacher(Dense())
    answers(teacher, "fine-tuning", keep=False)
    assert teacher.kept == []


def test_answers_are_rounded_under_autocast_whether_kept_or_not():
    for keep in (True, False):
        teacher = Teacher(Dense()).begin("level 1", keep=keep)
        with torch.autocast("cpu", torch.bfloat16):
            lesson = teacher(batch=1)
        assert {tensor.dtype for tensor in lesson.tensors()} == {torch.bfloat16}
        assert {tensor.dtype for tensor in teacher.begin("other", keep=keep)(batch=1).tensors()} == {torch.float32}


def test_the_memory_asked_for_is_that_of_the_answers_up_to_a_bound():
    config = SimpleNamespace(num_hidden_layers=2, hidden_size=8, num_attention_heads=3)
    lengths = np.array([4, 6])
    assert memory(10, lengths, config) == 4 * (10 * 5 * 8 * 3 + 10 * 26 * 3 * 2)
    assert memory(0, lengths, config) == 0
    assert memory(10**9, lengths, config) == memory(10, lengths, SimpleNamespace()) == MEMORY
