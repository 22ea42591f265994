"""Objects in modules that come and go while a compact network stays: attention processors."""

from dataclasses import dataclass
from typing import Any

from fastdiff.models.watch import Item, Unsupported, kind


@dataclass(frozen=True)
class Switch:
    """An object in a module that may be exchanged for another of a known class."""

    held: dict[str, Any]
    """The module's own attributes."""
    name: str
    known: tuple[str, ...]

    @property
    def now(self) -> Any:
        return self.held.get(self.name)

    @property
    def item(self) -> Item:
        return self.held, self.name, self.now

    def check(self) -> Any:
        """The object; Unsupported unless its class is known and everything it has is covered."""
        thing = self.now
        if kind(thing) not in self.known:
            raise Unsupported(f"the {self.name} {kind(thing)} in attention")
        for own in vars(thing):
            if hasattr(type(thing), own):
                raise Unsupported(f"a {kind(thing)} with a {own} of its own")
        return thing
