"""What the user can put right."""


class UserError(ValueError):
    """One clear sentence: what was got, what was expected, what to do. The CLI exits 2 with it."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a sentence: its first line, else its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
