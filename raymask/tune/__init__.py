"""Ray Tune: a search as a trial, and the command `raymask tune`.

Pass `raymask.tune.trial(spec)` to a `ray.tune.Tuner`.
"""

from raymask.tune.trial import trainable

__all__ = ["trainable"]
