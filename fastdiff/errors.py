"""The error for mistakes that the user can correct."""


class UserError(ValueError):
    """One clear sentence: what was given, what was expected, what to do. The CLI exits with 2."""
