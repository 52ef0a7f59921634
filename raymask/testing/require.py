"""Failure of a contract test."""

from __future__ import annotations


def require(condition: bool, rule: str, shown: str = "") -> None:
    """Raise AssertionError unless a rule holds. Unlike an assert statement, also in `python -O`.

    Args:
        condition: Whether it holds.
        rule: The rule, as a sentence without its full stop.
        shown: Code that shows that it is broken, where the rule does not name the call.

    Raises:
        AssertionError: The rule is broken.
    """
    if not condition:
        raise AssertionError(f"{rule}. To see it: {shown}" if shown else rule)
