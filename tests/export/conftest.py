"""The fixture of files that hold one transformer."""

from exports import out  # noqa: F401  a fixture
