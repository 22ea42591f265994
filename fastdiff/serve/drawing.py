"""What the server passes to an engine, and what the engine reports. Everything pickles."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Drawing:
    """One picture to draw. None: the pipeline's own."""

    prompt: str
    seed: int
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    """The name of a class of diffusers."""
    previews: int = 0
    """How many pictures to show on the way, evenly spaced."""


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
            UserError: before Accepted, where the pipeline does not draw that.
            Refused: where it cannot be drawn now.
        """
        ...

    def close(self) -> None:
        """Draw nothing more; returns once nothing is drawn."""
        ...
