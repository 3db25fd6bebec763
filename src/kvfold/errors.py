"""The ways a command ends before it is done. Every message says what, where, and what to do."""


class UserError(Exception):
    """What was asked for cannot be done as asked: exit code 2."""


class ConversionError(Exception):
    """What was asked for is right, but carrying it out failed: exit code 1."""


class Stopped(Exception):
    """A signal asked to stop and what was done is saved: exit code 143, as the shell reports SIGTERM."""
