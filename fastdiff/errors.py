"""The error for mistakes that the user can correct."""


class UserError(ValueError):
    """One clear sentence: what was given, what was expected, what to do. The CLI exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
