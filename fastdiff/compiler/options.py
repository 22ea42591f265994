"""What `fastdiff.compile` may be told."""

from dataclasses import dataclass

LOOP = "loop"
"""The denoising loop's name beside the components'."""


@dataclass(frozen=True)
class Options:
    """Choices of `fastdiff.compile`. Every default is lossless."""

    ignore: tuple[str, ...] = ()
    """Components to leave as they are, e.g. ("vae",), or ("loop",) for diffusers' own denoising
    loop around our networks. Gains nothing; costs their speed."""
