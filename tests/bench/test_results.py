"""The JSON of a result: no infinities, and the time of its making."""

import json
import math
from datetime import UTC, datetime, timedelta

from fastdiff.bench.receipt import Receipt
from fastdiff.bench.results import Result, Timed, to_json


def test_infinity_and_nan_become_null():
    receipt = Receipt(math.inf, 1.0, 0.0, math.nan, 0.0, 0.0, 0.0, 0.0, False)
    row = Timed("case", "eager", receipt=receipt)
    document = json.loads(to_json(Result({}, {}, None, "fastdiff bench", (row,))))
    assert document["schema"] == "fastdiff.bench/1"
    assert document["rows"][0]["receipt"]["psnr_db"] is None
    assert document["rows"][0]["receipt"]["err_vs_fp64"] is None
    assert document["rows"][0]["receipt"]["ssim"] == 1.0


def test_a_result_holds_its_time():
    document = json.loads(to_json(Result({}, {}, None, "fastdiff bench", ())))
    made = datetime.fromisoformat(document["created"])
    assert timedelta() <= datetime.now(UTC) - made < timedelta(minutes=1)
    assert made.microsecond == 0
