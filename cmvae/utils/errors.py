"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with code 2.
    """
