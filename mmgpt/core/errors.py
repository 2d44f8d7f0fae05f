"""The base of errors that a user can mend."""


class UserError(Exception):
    """Bad input or a bad setting: the message says what, where, and what to do; the command line prints it alone."""


class UsageError(UserError):
    """A command line that lacks what its command needs; it exits with 2, as for an option that there is not."""
