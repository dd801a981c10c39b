"""The two failures a command reports without a traceback, and the exit code of each."""


class UserError(Exception):
    """The user's input is wrong: the message names the thing and the remedy. Exit code 2."""

    exit_code = 2


class VerifyError(Exception):
    """A written file does not hold what was frozen, or its runtime disagrees. Exit code 3."""

    exit_code = 3
