"""The file of a paired run: schema `fastdiff.paired/1`."""

import json
from typing import Any

from fastdiff.bench.machine import machine
from fastdiff.bench.results import now
from fastdiff.regression.documents import PAIRED
from fastdiff.regression.pairs import Race
from fastdiff.regression.states import Place


def document(
    done: Race, places: dict[str, Place], case: str, threads: int, command: str
) -> dict[str, Any]:
    """Everything that a report needs, including raw samples. `places`: by side, base and new."""
    return {
        "schema": PAIRED,
        "case": case,
        "created": now(),
        "machine": machine() | {"threads": threads},
        "command": command,
        "seconds": round(done.seconds, 1),
        "states": {
            side: {
                "name": place.name,
                "commit": place.commit,
                "versions": done.versions[side],
            }
            for side, place in places.items()
        },
        "rows": done.rows if done.pairs else {side: [] for side in places},
        "times": [
            {"name": name, "unit": "ms", "base": base, "new": new}
            for name, (base, new) in (done.times | done.once).items()
        ],
        "counts": done.counts,
        "wrong": done.wrong,
    }


def to_json(paired: dict[str, Any]) -> str:
    return json.dumps(paired, indent=1, allow_nan=False) + "\n"
