"""Files are whole or absent, and JSON holds no infinities."""

import json
import math
from datetime import UTC, datetime, timedelta

import pytest

from fastdiff.bench.receipt import Receipt
from fastdiff.bench.results import Result, Row, check_writable, to_json, write_file
from fastdiff.errors import UserError


def test_infinity_and_nan_become_null():
    receipt = Receipt(math.inf, 1.0, 0.0, math.nan, 0.0, 0.0, 0.0, 0.0, False)
    row = Row("case", "eager", receipt=receipt)
    document = json.loads(to_json(Result({}, {}, None, "fastdiff bench", (row,))))
    assert document["schema"] == "fastdiff.bench/1"
    assert document["rows"][0]["receipt"]["psnr_db"] is None
    assert document["rows"][0]["receipt"]["err_vs_fp64"] is None
    assert document["rows"][0]["receipt"]["ssim"] == 1.0


def test_a_result_tells_when_it_was_made():
    document = json.loads(to_json(Result({}, {}, None, "fastdiff bench", ())))
    made = datetime.fromisoformat(document["created"])
    assert timedelta() <= datetime.now(UTC) - made < timedelta(minutes=1)
    assert made.microsecond == 0


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "out.json"
    write_file(target, lambda path: path.write_text("old"))

    def half(path):
        path.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(target, half)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert target.read_text() == "old"


def test_places_that_take_no_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        check_writable(tmp_path / "no" / "x.json", "--json")
    with pytest.raises(UserError, match="is a folder"):
        check_writable(tmp_path, "--json")
