"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """Something outside the code is wrong; the message says what, where, and what to do.

    Jobs print the message alone and end with exit code 2.
    """


class TrainingStopped(UserError):
    """Training cannot go on, on any worker; it would end so again."""
