"""What `fastdiff.compile` may be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Choices of `fastdiff.compile`. Every default is lossless."""

    ignore: tuple[str, ...] = ()
    """Components to leave as they are, e.g. ("vae",). Gains nothing; costs their speed."""
