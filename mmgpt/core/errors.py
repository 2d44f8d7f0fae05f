"""The base of errors that a user can mend."""


class UserError(Exception):
    """Bad input or a bad setting: the message says what, where, and what to do; the command line prints it alone."""
