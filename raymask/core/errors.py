"""Errors that the user can correct, and what is said of all others."""

TRACEBACK_NOTE = "The traceback is in "
"""How the note begins with which a search's unexpected error says where its traceback is."""


class UserError(Exception):
    """An error that the user can correct. The message says what is wrong, where, and what to do.

    The command line prints the message alone and ends with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """First line of an error's text, at most 300 characters; the type's name when the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def describe(error: BaseException) -> str:
    """An error on one line: a UserError's message, or type and message. Of an error of Ray, those of its cause."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError):
        return first_line(cause)
    return f"{type(cause).__name__}: {first_line(cause)}".rstrip(".")
