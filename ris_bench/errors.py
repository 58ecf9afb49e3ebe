"""The error that a user can act on."""


class UserError(ValueError):
    """Bad input: the message is one line saying what was given, what is allowed and what to do; the exit code is 2."""
