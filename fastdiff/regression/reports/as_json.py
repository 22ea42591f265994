"""A comparison as a document of schema `fastdiff.report/1`, with all samples."""

import json
from dataclasses import asdict
from typing import get_args

from fastdiff.jsonable import finite
from fastdiff.regression.comparison import Comparison, Verdict

SCHEMA = "fastdiff.report/1"


def to_json(comparison: Comparison) -> str:
    """The fields of `Comparison`, with the totals that a program would need."""
    document = {
        "schema": SCHEMA,
        "exit_code": comparison.exit_code,
        "verdicts": {verdict: comparison.count(verdict) for verdict in get_args(Verdict)},
        **asdict(comparison),
    }
    return json.dumps(finite(document), indent=1, allow_nan=False) + "\n"
