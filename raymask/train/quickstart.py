"""What does `raymask search` work on when it is given nothing: which task, which words, which model?"""

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedTokenizerFast

TRAIN_SIZE = 4000
REPORT_SIZE = 1000
MAX_WORDS = 20  # commas count; [CLS] and [SEP] come on top
MODEL_MAX_LENGTH = 64
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of their ids: padding is 0
PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS

# A clause is its text and its label: 1 when the speaker likes the film, 0 when not.
Clause = tuple[str, int]

# Indexed by label.
ADJECTIVES = (
    ("awful", "bland", "boring", "clumsy", "dreadful", "dull", "lazy", "lifeless", "messy", "pointless"),
    ("charming", "clever", "engaging", "fresh", "gripping", "lively", "lovely", "moving", "superb", "witty"),
)
# Indexed by whether the cue turns the label of what follows it. The two sides share words on purpose
# ("nothing but", "anything but"), so that one word alone does not tell.
WORD_CUES = (
    ("", "very", "really", "quite", "rather", "nothing but", "never less than"),
    ("not", "not very", "never", "hardly", "far from", "anything but", "less than"),
)
CLAUSE_CUES = (("i would say", "i think"), ("i would not say", "i doubt"))
# How two clauses of opposite labels are joined, and which of them is the one that counts.
CONTRASTS = {
    "{0} but {1}": 1,
    "{0}, yet {1}": 1,
    "although {0}, {1}": 1,
    "even though {0}, {1}": 1,
    "{0} although {1}": 0,
    "{0}, even though {1}": 0,
}
# {0} counts, {1} is about something else or is someone else's opinion and does not.
ASIDES = ("{1} and {0}", "{0} and {1}", "{0} while {1}", "while {1}, {0}")

FILM = ("the film", "this movie", "the plot", "the acting", "the ending", "the story")
FILM_VERBS = ("was", "seemed")
OTHER_THINGS = ("the book", "the trailer", "the cinema", "the poster")
OTHER_PEOPLE = ("critics", "my brother", "the newspapers")
OTHER_VERBS = ("called it", "found it")

# Mixed so that short sentences teach the words and the cues that the long ones need. With much more contrast
# or turning, a model this small stays far below 95 %, on some seeds below 80 %.
CONTRAST_RATE = 0.2
ASIDE_RATE = 0.2
WORD_TURN_RATE = 0.25
CLAUSE_CUE_RATE = 0.1
CLAUSE_TURN_RATE = 0.5


def sentences(seed: int) -> dict[str, tuple[list[str], list[int]]]:
    """{"train": (4000 texts, labels), "report": 1000 of both}: 1 if the reviewer likes the film, 0 if not.

    Negation, contrast and the opinions of others decide the label, so counting words does not. Labels are
    balanced and carry no noise; no text occurs twice, in one split or in both. Same seed, same sentences.
    """
    rng = random.Random(seed)  # noqa: S311 - sentences, not secrets
    by_label = _distinct(rng, (TRAIN_SIZE + REPORT_SIZE) // 2)
    # Shuffled before the cut: the few short sentences come up early, and all of them would land in train.
    for rows in by_label:
        rng.shuffle(rows)
    cut = TRAIN_SIZE // 2
    train = [row for rows in by_label for row in rows[:cut]]
    report = [row for rows in by_label for row in rows[cut:]]
    rng.shuffle(train)
    rng.shuffle(report)
    return {"train": _columns(train), "report": _columns(report)}


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token a word or comma, lower case; [CLS] A [SEP] or [CLS] A [SEP] B [SEP]; padding id 0."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    words = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(token, ids[token]) for token in (CLS, SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=MODEL_MAX_LENGTH,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
    )


def config() -> "BertConfig":
    """A BERT of two layers, 32 wide: small enough that a density of 1/16 costs accuracy on this task."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(vocabulary()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        # Some twenty epochs from scratch: dropout only slows the start.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=MODEL_MAX_LENGTH,
        # BERT's 0.02 is for matrices 768 wide; at 32 it makes the first epochs useless.
        initializer_range=0.08,
        num_labels=2,
        pad_token_id=0,
    )


def vocabulary() -> list[str]:
    """Every word that a sentence can contain, sorted, without the special tokens."""
    frames = [frame.format("", "") for frame in (*CONTRASTS, *ASIDES)]
    pairs = (*ADJECTIVES, *WORD_CUES, *CLAUSE_CUES)
    phrases = [*FILM, *FILM_VERBS, *OTHER_THINGS, *OTHER_PEOPLE, *OTHER_VERBS, *frames]
    phrases += [phrase for pair in pairs for phrase in pair]
    return sorted({word for phrase in phrases for word in words_of(phrase)})


def words_of(text: str) -> list[str]:
    """The words of a text as the tokenizer splits them: commas stand alone."""
    return text.replace(",", " , ").split()


def turn(cue: str, clause: Clause) -> Clause:
    """The clause behind the cue; the label changes when the cue is a negation."""
    text, label = clause
    turns = cue in WORD_CUES[1] or cue in CLAUSE_CUES[1]
    return f"{cue} {text}".lstrip(), 1 - label if turns else label


def contrast(frame: str, first: Clause, second: Clause) -> Clause:
    """Both clauses in one of CONTRASTS; the label is that of the clause which this frame says counts."""
    return frame.format(first[0], second[0]), (first, second)[CONTRASTS[frame]][1]


def aside(frame: str, clause: Clause, other: str) -> Clause:
    """The clause with an opinion in one of ASIDES that does not count; the label is the clause's."""
    return frame.format(clause[0], other), clause[1]


def sentence(rng: random.Random) -> Clause:
    """One review: a contrast, a clause with an aside, or a clause."""
    kind = rng.random()
    if kind < CONTRAST_RATE:
        return _contrasted(rng)
    clause = _clause(rng)
    if rng.random() < CLAUSE_CUE_RATE:
        clause = turn(rng.choice(CLAUSE_CUES[rng.random() < CLAUSE_TURN_RATE]), clause)
    if kind < CONTRAST_RATE + ASIDE_RATE:
        return aside(rng.choice(ASIDES), clause, _other(rng))
    return clause


def _predicate(rng: random.Random) -> Clause:
    label = rng.randrange(2)
    cue = rng.choice(WORD_CUES[rng.random() < WORD_TURN_RATE])
    return turn(cue, (rng.choice(ADJECTIVES[label]), label))


def _clause(rng: random.Random) -> Clause:
    text, label = _predicate(rng)
    return f"{rng.choice(FILM)} {rng.choice(FILM_VERBS)} {text}", label


def _contrasted(rng: random.Random) -> Clause:
    first = second = _clause(rng)
    while second[1] == first[1]:
        second = _clause(rng)
    return contrast(rng.choice(tuple(CONTRASTS)), first, second)


def _other(rng: random.Random) -> str:
    subjects, verbs = rng.choice(((OTHER_THINGS, FILM_VERBS), (OTHER_PEOPLE, OTHER_VERBS)))
    return f"{rng.choice(subjects)} {rng.choice(verbs)} {_predicate(rng)[0]}"


def _distinct(rng: random.Random, size: int) -> tuple[list[Clause], list[Clause]]:
    """`size` different sentences of label 0 and as many of label 1."""
    # Dicts, not sets: the order must not depend on hashes.
    found: tuple[dict[str, None], dict[str, None]] = ({}, {})
    while min(len(texts) for texts in found) < size:
        text, label = sentence(rng)
        if len(words_of(text)) <= MAX_WORDS and len(found[label]) < size:
            found[label][text] = None
    return [(text, 0) for text in found[0]], [(text, 1) for text in found[1]]


def _columns(rows: list[Clause]) -> tuple[list[str], list[int]]:
    return [text for text, _ in rows], [label for _, label in rows]
