"""The ways a command ends before it is done. Every message says what, where, and what to do."""

import errno


class UserError(Exception):
    """What was asked for cannot be done as asked: exit code 2."""


class ConversionError(Exception):
    """What was asked for is right, but carrying it out failed: exit code 1."""


class NothingGained(ConversionError):
    """An uptraining that came no nearer than the checkpoint it began with."""


class Stopped(Exception):
    """A signal asked to stop and what was done is saved. `code` is the exit code, as the shell reports the signal."""

    def __init__(self, message: str, code: int = 143) -> None:
        super().__init__(message)
        self.code = code


def explain(error: OSError, where: object = "input/output") -> str:
    """What the system refused, where (`where` if the error does not say), and what to do about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some of the disk" if full else "check the path, its permissions and the disk"
    return f"{error.filename2 or error.filename or where}: {error.strerror or error}; {remedy}"
