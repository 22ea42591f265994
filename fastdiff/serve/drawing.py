"""What the server passes to an engine, and what the engine reports. Everything pickles."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Drawing:
    """One picture to draw. None: the pipeline's default."""

    prompt: str
    seed: int
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    """The name of a scheduler class of diffusers."""
    previews: int = 0
    """How many pictures to show before the final one, evenly spaced."""


class Accepted(NamedTuple):
    """The request can be drawn, and waits for its first step."""


class Step(NamedTuple):
    """A step is done."""

    done: int
    steps: int
    """Calls of the network for the whole picture: some schedulers need more than `steps`."""
    preview: bytes | None
    """A PNG of the latents after this step."""


class Picture(NamedTuple):
    """The picture is drawn."""

    png: bytes


Event = Accepted | Step | Picture


class Engine(Protocol):
    """Draws pictures: `painter.Painter` in this process, or `replicas.Replicas` on Ray."""

    places: int
    """Pictures that can be drawn at the same time."""

    def draw(self, drawing: Drawing) -> AsyncIterator[Event]:
        """Accepted, then a Step after each step, then the Picture. Closing it cancels.

        Raises:
            UserError: before Accepted, if the pipeline cannot draw that.
            Refused: if it cannot be drawn now.
        """
        ...

    def close(self) -> None:
        """Draw no more pictures; returns once none is being drawn."""
        ...
