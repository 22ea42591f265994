"""A bench's result, and its file: schema `fastdiff.bench/1`."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastdiff.bench.receipt import Receipt
from fastdiff.bench.stats import Ratio
from fastdiff.jsonable import finite

SCHEMA = "fastdiff.bench/1"


@dataclass(frozen=True)
class Timed:
    """One backend on one case.

    If the receipt failed or the backend could not run (`unavailable` says why), speeds are None and
    samples empty. ratio_vs_eager: of steps; image_ratio_vs_eager: of images, with the VAE, too;
    decode_ratio_vs_eager: of the VAE alone. samples_ms: per step; image_samples_ms: per image;
    element i is round i. text_samples_ms and decode_samples_ms are the parts of an image before its
    first step and after its last (files from before 2026-12 have neither). peak_mem_bytes: see
    `memory`. prepare_s: the seconds before a second picture, minus those of a warm picture: that
    is, preparation and the first call.
    """

    case: str
    backend: str
    unavailable: str | None = None
    steps_per_s: float | None = None
    images_per_s: float | None = None
    ratio_vs_eager: Ratio | None = None
    image_ratio_vs_eager: Ratio | None = None
    decode_ratio_vs_eager: Ratio | None = None
    samples_ms: tuple[float, ...] = ()
    image_samples_ms: tuple[float, ...] = ()
    text_samples_ms: tuple[float, ...] = ()
    decode_samples_ms: tuple[float, ...] = ()
    receipt: Receipt | None = None
    peak_mem_bytes: int | None = None
    prepare_s: float | None = None

    @property
    def failed(self) -> bool:
        return self.receipt is not None and not self.receipt.passed


def now() -> str:
    """UTC, ISO 8601, to the second: it orders the results of one branch."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Result:
    """All rows, and where they come from."""

    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    created: str = field(default_factory=now, kw_only=True)
    command: str
    rows: tuple[Timed, ...]
    incomplete: bool = False
    """Whether the run is not finished, or was ended before its last round."""


def to_json(result: Result) -> str:
    """The result as schema `fastdiff.bench/1`; infinities and NaN become null."""
    document = finite({"schema": SCHEMA, **asdict(result)})
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
