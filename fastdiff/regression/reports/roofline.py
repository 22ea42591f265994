"""Kernels in relation to a processor's two limits: arithmetic and memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RoofPoint:
    """One kernel, block or network."""

    name: str
    flops: float
    bytes: float
    ms: float | None = None
    """None if not measured: it is then drawn at its roofline."""

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
    """A processor's peak rates, and what runs on it."""

    gpu: str
    tflops: float
    """Peak TFLOP/s."""
    tbytes: float
    """Peak TB/s."""
    points: tuple[RoofPoint, ...]

    def roof(self, intensity: float) -> float:
        """The most TFLOP/s possible at this many FLOP per byte."""
        return min(self.tflops, self.tbytes * intensity)

    def share(self, point: RoofPoint) -> float | None:
        """The point's share of what is possible, 0 to 1; None if not measured."""
        return point.tflops / self.roof(point.intensity) if point.tflops else None

    @property
    def drawable(self) -> list[RoofPoint]:
        """The points that logarithmic axes can show."""
        return [point for point in self.points if point.flops > 0 and point.bytes > 0]
