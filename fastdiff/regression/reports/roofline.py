"""Where kernels stand under a processor's two limits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RoofPoint:
    """One kernel, block or network."""

    name: str
    flops: float
    bytes: float
    ms: float | None = None
    """None where nobody has measured it: it is drawn where it would be at best."""

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    @property
    def tflops(self) -> float | None:
        """TFLOP/s."""
        return self.flops / self.ms / 1e9 if self.ms else None


@dataclass(frozen=True)
class Roofline:
    """A processor's rates and what runs on it."""

    gpu: str
    tflops: float
    """TFLOP/s at most."""
    tbytes: float
    """TB/s at most."""
    points: tuple[RoofPoint, ...]

    def roof(self, intensity: float) -> float:
        """TFLOP/s at most at so many FLOP per byte."""
        return min(self.tflops, self.tbytes * intensity)

    def share(self, point: RoofPoint) -> float | None:
        """Of what is possible, 0 to 1."""
        return point.tflops / self.roof(point.intensity) if point.tflops else None

    @property
    def drawable(self) -> list[RoofPoint]:
        """Those that have a place on logarithmic axes."""
        return [point for point in self.points if point.flops > 0 and point.bytes > 0]
