"""Points under a roof."""

from dataclasses import replace

from fastdiff.regression.reports.roofline import Roofline, RoofPoint

ROOF = Roofline("gpu", 100.0, 2.0, ())


def test_the_roof():
    assert ROOF.roof(10) == 20
    assert ROOF.roof(50) == ROOF.roof(1e6) == 100
    point = RoofPoint("a", 4e9, 4e8, 0.4)  # 10 FLOP per byte, 10 TFLOP/s
    assert (point.intensity, point.tflops) == (10, 10)
    assert ROOF.share(point) == 0.5
    assert ROOF.share(replace(point, ms=None)) is None
    odd = replace(ROOF, points=(point, replace(point, flops=0), replace(point, bytes=0)))
    assert odd.drawable == [point]
