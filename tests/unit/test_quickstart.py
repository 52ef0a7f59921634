"""The quickstart task: reproducible, balanced, disjoint, and more than counting words."""

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from raymask.data import quickstart
from raymask.data.quickstart import ASIDES, CLAUSE_CUES, CONTRASTS, WORD_CUES, add_cue, aside, contrast

Splits = dict[str, tuple[list[str], list[int]]]

GOOD = ("the film was superb", 1)
BAD = ("the plot seemed dull", 0)
BAG_OF_WORDS_AT_MOST = 0.80


@pytest.fixture(scope="module")
def splits() -> Splits:
    return quickstart.sentences(0)


def test_the_seed_decides_the_sentences(splits: Splits) -> None:
    assert quickstart.sentences(0) == splits
    assert quickstart.sentences(1) != splits


def test_no_text_occurs_twice(splits: Splits) -> None:
    texts = [*splits["train"][0], *splits["report"][0]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("name", "size"), [("train", quickstart.TRAIN_SIZE), ("report", quickstart.TEST_SIZE)])
def test_splits_have_their_size_and_balanced_labels(splits: Splits, name: str, size: int) -> None:
    texts, labels = splits[name]
    assert len(texts) == len(labels) == size
    assert set(labels) == {0, 1}
    assert sum(labels) * 2 == size


def test_tokens_are_known_and_few(splits: Splits) -> None:
    tokenizer = quickstart.tokenizer()
    rows = tokenizer([*splits["train"][0], *splits["report"][0]])["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in rows)
    assert max(map(len, rows)) <= quickstart.MAX_WORDS + 2 < tokenizer.model_max_length


def test_every_word_of_the_vocabulary_is_used(splits: Splits) -> None:
    used = {word for text in splits["train"][0] for word in quickstart.words_of(text)}
    assert used == set(quickstart.vocabulary())


def test_tokenizer_frames_and_pads_like_bert() -> None:
    tokenizer = quickstart.tokenizer()
    pair = tokenizer("The film was dull", "critics, superb", padding="max_length", max_length=12)
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert " ".join(tokens) == "[CLS] the film was dull [SEP] critics , superb [SEP] [PAD] [PAD]"
    assert tokenizer.pad_token_id == 0
    assert tokenizer.model_max_length == quickstart.MODEL_MAX_LENGTH
    assert tokenizer.get_vocab() == quickstart.tokenizer().get_vocab()


def test_config_fits_the_tokenizer() -> None:
    config = quickstart.config()
    assert config.vocab_size == len(quickstart.tokenizer())
    assert config.num_labels == 2
    assert config.hidden_size % config.num_attention_heads == 0


@pytest.mark.parametrize("clause", [GOOD, BAD])
@pytest.mark.parametrize("cues", [WORD_CUES, CLAUSE_CUES])
def test_only_negations_turn_a_label(cues: tuple[tuple[str, ...], ...], clause: quickstart.Clause) -> None:
    assert {add_cue(cue, clause)[1] for cue in cues[0]} == {clause[1]}
    assert {add_cue(cue, clause)[1] for cue in cues[1]} == {1 - clause[1]}


def test_a_double_negation_restores_the_label() -> None:
    assert add_cue("i doubt", add_cue("never", ("dull", 0))) == ("i doubt never dull", 0)
    assert add_cue("i would say", add_cue("anything but", ("dull", 0)))[1] == 1
    assert add_cue("i would say", add_cue("nothing but", ("dull", 0)))[1] == 0


def test_an_empty_cue_changes_nothing() -> None:
    assert add_cue("", GOOD) == GOOD


@pytest.mark.parametrize("frame", CONTRASTS)
def test_a_concession_loses_wherever_it_stands(frame: str) -> None:
    conceded_first = frame.startswith(("although", "even though")) or "but" in frame or "yet" in frame
    assert contrast(frame, GOOD, BAD)[1] == (0 if conceded_first else 1)
    assert contrast(frame, BAD, GOOD)[1] == (1 if conceded_first else 0)


@pytest.mark.parametrize("frame", ASIDES)
@pytest.mark.parametrize("clause", [GOOD, BAD])
def test_the_opinion_of_others_does_not_count(frame: str, clause: quickstart.Clause) -> None:
    for other in ("critics called it awful", "the book was superb"):
        text, label = aside(frame, clause, other)
        assert label == clause[1]
        assert clause[0] in text
        assert other in text


def test_counting_words_is_not_enough(splits: Splits) -> None:
    words = CountVectorizer()
    model = LogisticRegression(max_iter=300).fit(words.fit_transform(splits["train"][0]), splits["train"][1])
    assert model.score(words.transform(splits["report"][0]), splits["report"][1]) < BAG_OF_WORDS_AT_MOST
