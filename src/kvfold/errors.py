"""The two ways a command ends badly. Every message says what, where, and what to do."""


class UserError(Exception):
    """What was asked for cannot be done as asked: exit code 2."""


class ConversionError(Exception):
    """What was asked for is right, but carrying it out failed: exit code 1."""
