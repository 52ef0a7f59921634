"""Named seeds: every random choice derives its own seed from the spec's."""

from hashlib import blake2b

# Purposes of seeds. The texts are frozen: another text gives another seed, and so other masks and results.
AUDIT = "audit"
BOOTSTRAP = "bootstrap"
CALIBRATION = "calibration"
CANDIDATE = "candidate"
CONFIDENCE = "confidence"
DROPOUT = "dropout"
EARLY_EVAL = "probe"
FINETUNE = "fine-tune"
HEAD = "head"
MASK_DRAW = "mask"
ORDER = "order"
QUICKSTART_ROWS = "quickstart"
SCORED_ROWS = "look"
SHARD = "shard"
VALIDATION = "select"


def derive(seed: int, *names: str | int) -> int:
    """Derive the seed for one named purpose; different names give independent seeds.

    Args:
        seed: The spec's seed, or another derived one, in [0, 2^63).
        *names: The purpose. The texts are hashed with a separator, so that ("a", 12) and ("a1", 2) differ.

    Returns:
        A seed in [0, 2^63).
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
