"""What the user can put right."""


class UserError(ValueError):
    """One clear sentence: what was got, what was expected, what to do. The CLI exits 2 with it."""
