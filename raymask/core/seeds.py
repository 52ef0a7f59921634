"""Named seeds: every random choice derives its own from the spec's."""

from hashlib import blake2b

# What a seed is for. The texts are frozen: another text is another seed, and changes masks and figures.
AUDIT = "audit"
BOOTSTRAP = "bootstrap"
CALIBRATION = "calibration"
CANDIDATE = "candidate"
CONFIDENCE = "confidence"
DROPOUT = "dropout"
EARLY_EVAL = "probe"
FINETUNE = "fine-tune"
HEAD = "head"
MASK = "mask"
ORDER = "order"
QUICKSTART = "quickstart"
SCORED_ROWS = "look"
SHARD = "shard"
VALIDATION = "select"


def derive(seed: int, *names: str | int) -> int:
    """The seed of one named purpose; other names give independent seeds.

    Args:
        seed: The spec's seed, or another derived one, in [0, 2^63).
        names: What it is for. Their texts are hashed with a separator, so that ("a", 12) and ("a1", 2) differ.

    Returns:
        A seed in [0, 2^63).
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
