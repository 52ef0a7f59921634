"""Which mistakes are the user's?"""


class UserError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do.

    The command line prints the message alone and ends with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """An error's text without the paragraphs that some libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
