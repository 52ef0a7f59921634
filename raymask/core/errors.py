"""Which mistakes are the user's?"""


class UserError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do.

    The command line prints the message alone and ends with exit code 2.
    """
