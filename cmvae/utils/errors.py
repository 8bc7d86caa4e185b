"""The one exception that is written for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    Entry points print the message alone, without a traceback, and leave with exit code 2.
    """
