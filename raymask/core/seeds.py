"""Where does every random choice come from?"""

from hashlib import blake2b


def derive(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for one named purpose; other names give independent seeds.

    The names' texts are hashed with a separator, so that ("a", 12) and ("a1", 2) differ.
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
