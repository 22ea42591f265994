"""The roofline's data: points under a roof, and files with damaged numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastdiff.errors import UserError
from fastdiff.regression.reports.roofline import Roofline, RoofPoint
from fastdiff.regression.rooflines import read

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/roofline/sd15-h200.json"
ROOF = Roofline("gpu", 100.0, 2.0, ())


def test_the_roof_and_the_share_of_a_point():
    assert ROOF.roof(10) == 20
    assert ROOF.roof(50) == ROOF.roof(1e6) == 100
    point = RoofPoint("a", 4e9, 4e8, 0.4)  # 10 FLOP per byte, 10 TFLOP/s
    assert (point.intensity, point.tflops) == (10, 10)
    assert ROOF.share(point) == 0.5
    assert ROOF.share(replace(point, ms=None)) is None
    odd = replace(ROOF, points=(point, replace(point, flops=0), replace(point, bytes=0)))
    assert odd.drawable == [point]


@pytest.mark.parametrize("field", ["flops", "bytes", "measured_ms"])
def test_a_damaged_number_is_one_sentence(tmp_path, field):
    """The committed file has an older schema, which calls its rates measured, not reported."""
    document = json.loads(COMMITTED.read_text())
    assert read(COMMITTED).tflops == document["gpu"]["measured_tflops"] == 790
    document["rows"][3][field] = float("nan")
    path = tmp_path / "roofline.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=f"^{path}: conv in has a sample of nan"):
        read(path)
