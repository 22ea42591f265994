"""A budget of minutes: what does not fit is left out and reported."""

import time
from dataclasses import dataclass, field


@dataclass
class Budget:
    """A budget that starts when it is made."""

    minutes: float
    left_out: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """The seconds left."""
        return self.start + 60 * self.minutes - time.monotonic()

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether something that takes about this long still fits; remembers what does not."""
        if self.left_s > seconds:
            return True
        self.left_out.append(what)
        return False

    def say(self) -> None:
        """Print one line about what was left out, if anything was."""
        if self.left_out:
            print(f"{self.minutes:g} minutes are over; left out: {', '.join(self.left_out)}")
