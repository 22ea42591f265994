"""The manifest beside a TensorRT plan: schema `fastdiff.engine/1`, with the plan's hash."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from fastdiff.engines import fingerprint
from fastdiff.errors import UserError

SCHEMA = "fastdiff.engine/1"
FILE, PLAN = "engine.json", "model.plan"
AGAIN = "run fastdiff export --trt again"

ENDS = ("min", "opt", "max")
Profile = dict[str, dict[str, list[int]]]
"""By input with free sides: its "min", "opt" and "max" shapes."""


@dataclass(frozen=True)
class Manifest:
    """A plan and its origin.

    flavor, version: the library that built it, tensorrt or rtx, and the library's version.
    target: the GPU it was built for, such as sm_89; compatible: hardware, version, or neither.
    dtype: the weights'. inputs, outputs: the dtype and sides of each tensor, by name; a named side
    is free within the profiles.
    onnx_sha256: hash of the ONNX file it was built from, then of the weights beside it, if any.
    config_sha256: hash of the network's config.json. network_sha256: see `fingerprint.of_network`.
    numeric_check: its outputs compared with torch's on a GPU; None if that was not run, with the
    reason.
    """

    part: str
    flavor: str
    version: str
    target: str
    compatible: list[str]
    dtype: str
    opset: int
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    profiles: list[Profile]
    plan_bytes: int
    plan_sha256: str
    onnx_sha256: str
    config_sha256: str
    network_sha256: str
    numeric_check: dict[str, Any] | None
    numeric_check_reason: str | None
    build_seconds: float
    versions: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """The manifest's JSON."""
        return {"schema": SCHEMA, **asdict(self)}


def read(folder: Path) -> Manifest:
    """The manifest in `folder`, without checking its plan.

    UserError if there is none, if it has another schema, or if it is damaged.
    """
    path = folder / FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no engine: {FILE} is missing; fastdiff export --trt writes one"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); {AGAIN}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema!r}, but this fastdiff reads {SCHEMA}; {AGAIN}")
    values = {field.name: document.get(field.name) for field in fields(Manifest)}
    for field in fields(Manifest):
        if not _is_a(values[field.name], field.type):
            raise UserError(f"{path} has {values[field.name]!r} for {field.name}; {AGAIN}")
    if not values["part"].isidentifier():  # it names a folder in a server's repository
        raise UserError(f"{path} has {values['part']!r} for part; {AGAIN}")
    for name, shapes in (item for profile in values["profiles"] for item in profile.items()):
        if len({len(shapes.get(end, ())) for end in ENDS}) > 1 or not shapes.keys() >= set(ENDS):
            raise UserError(f"{path} has {shapes!r} for the shapes of {name}; {AGAIN}")
    return Manifest(**values)


def plan(folder: Path, manifest: Manifest) -> bytes:
    """The plan in `folder`; UserError unless its hash is the manifest's.

    The hash detects damage. It is not a signature: anyone who can write a plan can write its hash.
    """
    try:
        content = (folder / PLAN).read_bytes()
    except OSError as error:
        raise _unreadable(folder, error) from error
    _compare(folder, manifest, len(content), hashlib.sha256(content).hexdigest())
    return content


def check(folder: Path) -> Manifest:
    """The manifest in `folder`, after its plan is checked. UserError as for `plan`."""
    manifest = read(folder)
    try:
        size, digest = (folder / PLAN).stat().st_size, fingerprint.of_files(folder / PLAN)
    except OSError as error:
        raise _unreadable(folder, error) from error
    _compare(folder, manifest, size, digest)
    return manifest


def find(folder: Path) -> tuple[Path, ...]:
    """The folders at or below `folder` with a plan or a manifest. UserError if there are none."""
    found = {path.parent for name in (FILE, PLAN) for path in folder.rglob(name)}
    if not found:
        raise UserError(f"{folder} holds no engine; fastdiff export --trt writes them")
    return tuple(sorted(found))


def _compare(folder: Path, manifest: Manifest, size: int, digest: str) -> None:
    path = folder / PLAN
    if size != manifest.plan_bytes:
        raise UserError(
            f"{path} has {size} bytes, but {manifest.plan_bytes} were written; copy it again, or"
            f" {AGAIN}"
        )
    if digest != manifest.plan_sha256:
        raise UserError(
            f"{path} has SHA-256 {digest[:12]}…, but {manifest.plan_sha256[:12]}… was written; copy"
            f" it again, or {AGAIN}"
        )


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder / PLAN} cannot be read: {error.strerror or error}; {AGAIN}")


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value from JSON, with everything in it, has the type of a field's annotation."""
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if not isinstance(value, get_origin(kind) or kind) or isinstance(value, bool):
        return False
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_is_a(one, get_args(kind)[-1]) for one in held)
