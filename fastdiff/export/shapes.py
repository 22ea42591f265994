"""Converts picture sizes in pixels to the shapes of every input, which an engine is built for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.engines.manifest import Profile
from fastdiff.errors import UserError
from fastdiff.export.parts import Part, Port
from fastdiff.families.part import PACKED


@dataclass(frozen=True)
class Pictures:
    """A number of pictures, with their height and width in pixels."""

    count: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.count}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Shapes:
    """The minimum, optimum and maximum pictures of an engine."""

    least: Pictures
    best: Pictures
    most: Pictures

    @property
    def static(self) -> bool:
        return self.least == self.most

    def __str__(self) -> str:
        return f"{self.least}:{self.best}:{self.most}"


def parse(shapes: str | None, static: str | None) -> Shapes | None:
    """Parse `--shapes MIN:OPT:MAX` or `--static BxHxW`; None if neither is given."""
    if shapes and static:
        raise UserError("got --shapes and --static; give only one of them")
    if static:
        one = _pictures("--static", static)
        return Shapes(one, one, one)
    if not shapes:
        return None
    ends = shapes.split(":")
    if len(ends) != 3:
        raise UserError(f"--shapes is {shapes!r}; give MIN:OPT:MAX, each such as 1x512x512")
    least, best, most = (_pictures("--shapes", end) for end in ends)
    for side in ("count", "height", "width"):
        low, middle, high = (getattr(end, side) for end in (least, best, most))
        if not low <= middle <= high:
            raise UserError(
                f"--shapes {shapes}: {side} is {low}, {middle}, {high}; it must not decrease"
            )
    return Shapes(least, best, most)


def default(parts: Sequence[Part], side: int) -> Shapes:
    """One to two pictures, of half to one and a half times the network's own `side` (latents)."""
    unit = multiple(parts)
    pixels = side * _pixels(parts)
    half, more = (max(unit, times * pixels // 2 // unit * unit) for times in (1, 3))
    return Shapes(Pictures(1, half, half), Pictures(1, pixels, pixels), Pictures(2, more, more))


def multiple(parts: Sequence[Part]) -> int:
    """The number of pixels that must divide every picture's height and width."""
    return math.lcm(*(_unit(part, parts) for part in parts))


def profiles(parts: Sequence[Part], shapes: Shapes) -> dict[str, Profile]:
    """The input shapes of each part, by its folder. UserError for sizes that a part cannot take.

    With guidance, networks that see the text have twice the batch: from the pictures of `least` to
    twice those of `most`. A static denoising network takes exactly twice its pictures. A text
    encoder always takes one half's texts, as diffusers encodes them. Text has its full length.
    """
    for part in parts:
        if part.packed and _pixels(parts) == 1:
            raise UserError(
                f"{part.folder} has no VAE beside it to convert pixels to latents, so no engine can"
                " be built of it"
            )
    for end in (shapes.least, shapes.best, shapes.most):
        for part in parts:
            for side in ("height", "width"):
                unit, got = _unit(part, parts), getattr(end, side)
                if got % unit:
                    raise UserError(
                        f"{end}: {side} {got} is not a multiple of {unit}, which {part.folder}"
                        f" needs; {multiple(parts)} suits every network"
                    )
                if part.most and got > (most := part.most * _pixels(parts)):
                    raise UserError(
                        f"{end}: {side} {got} is more than {most}, the maximum of {part.folder}"
                    )
    return {part.folder: _profile(part, parts, shapes) for part in parts}


def _profile(part: Part, parts: Sequence[Part], shapes: Shapes) -> Profile:
    profile: Profile = {port.name: {} for port in part.inputs if _free(port)}
    latent = 1 if _in_pixels(part) else _pixels(parts)
    denoises = "height" in part.example or bool(part.packed)
    for name, end in (("min", shapes.least), ("opt", shapes.best), ("max", shapes.most)):
        alone = name == "min" and not (shapes.static and denoises)
        guided = part.guided and "sequence_length" in part.example and not alone
        height, width = end.height // latent, end.width // latent
        sides = {
            "batch_size": end.count * (2 if guided else 1),
            "height": height,
            "width": width,
            "sequence_length": part.cases[0].get("sequence_length", 1),
        }
        if part.packed:
            sides[PACKED] = (height // part.packed) * (width // part.packed)
        for port in part.inputs:
            if _free(port):
                profile[port.name][name] = list(port.at(sides))
    return profile


def _free(port: Port) -> bool:
    return any(isinstance(side, str) for side in port.shape)


def _in_pixels(part: Part) -> bool:
    """Whether its sides are in pixels: its output's are fractions of them."""
    return any("//" in str(side) for port in part.outputs for side in port.shape)


def _pixels(parts: Sequence[Part]) -> int:
    """Pixels per latent, read from the VAE's ports."""
    sides = (str(side) for part in parts for port in part.outputs for side in port.shape)
    return next((int(side.split("//")[1]) for side in sides if "//" in side), 1)


def _unit(part: Part, parts: Sequence[Part]) -> int:
    """The number of pixels that divides all its traced and verified heights and widths."""
    if part.packed:
        return part.packed * _pixels(parts)
    sizes = (part.example, *part.cases)
    own = math.gcd(*(each[side] for each in sizes for side in ("height", "width") if side in each))
    return own * (1 if _in_pixels(part) else _pixels(parts)) if own else 1


def _pictures(option: str, text: str) -> Pictures:
    numbers = text.split("x")
    if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and int(n) for n in numbers):
        raise UserError(
            f"{option} has {text!r}; give pictures x height x width in pixels, such as 1x512x512"
        )
    return Pictures(*map(int, numbers))
