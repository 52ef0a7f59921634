"""Errors that the user can correct."""


class UserError(Exception):
    """An error that the user can correct. The message says what is wrong, where, and what to do.

    The command line prints the message alone and ends with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """First line of an error's text, at most 300 characters; the type's name when the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
