"""A folder of compiled kernels, for machines that should not compile them: `fastdiff.warm/1`.

It holds a `.cubin` and Triton's metadata as JSON for each specialisation and architecture, and a
manifest with every file's hash. `install` puts the kernels into Triton's own cache, under the keys
that Triton gave them when they were compiled. A launch uses one only if Triton computes the same
key: for the same source, compiler, options and environment. So no other code ever runs.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.kernels.jobs import Job, kernel_of
from fastdiff.kernels.pool import compile_jobs
from fastdiff.written import write_file, write_text

SCHEMA = "fastdiff.warm/1"
MANIFEST = "manifest.json"
AGAIN = "run fastdiff warm again"


@dataclass(frozen=True)
class File:
    """One file in the folder."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Compiled:
    """A compiled specialisation."""

    arch: int
    kernel: str
    """The names of its module and function, joined by a dot."""
    key: str
    """The key in Triton's cache."""
    cubin: File
    metadata: File


@dataclass(frozen=True)
class Module:
    """A C module that Triton 3.6 compiles before it starts a kernel."""

    name: str
    key: str
    binary: File


@dataclass(frozen=True)
class Shipped:
    """A folder written by `fastdiff warm`, with its files unchanged."""

    folder: Path
    of: str
    """The pipeline and dtype, as named when it was written."""
    compilers: Mapping[int, Mapping[str, str]]
    """By architecture: see `cached.compiler_of`."""
    sources: Mapping[str, str]
    """The hash of each kernel's source."""
    kernels: tuple[Compiled, ...]
    modules: tuple[Module, ...]


def ship(
    folder: Path, of: str, jobs: Sequence[Job], told: Callable[[int], object] = lambda done: None
) -> Shipped:
    """Compile the jobs' kernels here into an empty folder; calls `told(done)` after each.

    Raises UserError if one of them cannot be compiled.
    """
    with tempfile.TemporaryDirectory(prefix="fastdiff-warm-") as cache:
        keys = {}
        alone = {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1"}
        for answer in compile_jobs(jobs, alone):
            if answer.key is None:
                raise UserError(f"{answer.job.kernel} cannot be compiled: {answer.error}")
            keys[answer.at] = answer.key
            told(len(keys))
        return _collected(folder, of, jobs, keys, Path(cache))


def _collected(
    folder: Path, of: str, jobs: Sequence[Job], keys: Mapping[int, str], cache: Path
) -> Shipped:
    """The folder, filled from one of Triton's caches."""
    from fastdiff.kernels import cached

    kernels: list[Compiled] = []
    modules: dict[str, Module] = {}
    for at_job, job in enumerate(jobs):
        key = keys[at_job]
        cubin, metadata, _ = cached.files_of(job.kernel)
        stem = f"sm_{job.arch}-{job.kernel.strip('_')}-{key[:12].lower()}"
        parts = [
            _copied(cache / key / name, folder / f"{stem}{Path(name).suffix}")
            for name in (cubin, metadata)
        ]
        kernels.append(Compiled(job.arch, f"{job.module}.{job.kernel}", key, *parts))
        for name, source in cached.modules_of(job).items():
            at = cached.key_of_module(source)
            if at not in modules:
                file = f"{name.strip('_')}-{at[:12].lower()}{cached.SUFFIX}"
                binary = _copied(cache / at / f"{name}{cached.SUFFIX}", folder / file)
                modules[at] = Module(name, at, binary)
    shipped = Shipped(
        folder,
        of,
        {arch: cached.compiler_of(arch) for arch in sorted({job.arch for job in jobs})},
        {f"{job.module}.{job.kernel}": cached.hash_of(kernel_of(job)) for job in jobs},
        tuple(kernels),
        tuple(modules.values()),
    )
    document = {"schema": SCHEMA, **asdict(shipped)}
    del document["folder"]  # the folder may be moved
    write_text(folder / MANIFEST, json.dumps(document, indent=1) + "\n")
    return shipped


def read(folder: Path) -> Shipped:
    """A folder written by `fastdiff warm`, after every file's hash is checked.

    Raises UserError if it is not such a folder, has another schema, or is damaged.
    """
    path = folder / MANIFEST
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no kernels: {MANIFEST} is missing; fastdiff warm writes one"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); {AGAIN}") from error
    schema = told.pop("schema", None) if isinstance(told, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema!r}, but this fastdiff reads {SCHEMA}; {AGAIN}")
    try:
        shipped = _parsed(folder, told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    for kernel in shipped.kernels:
        _bytes(folder, kernel.cubin)
        _bytes(folder, kernel.metadata)
    for module in shipped.modules:
        _bytes(folder, module.binary)
    return shipped


def differences(shipped: Shipped, jobs: Iterable[Job], arch: int) -> list[str]:
    """Why Triton would not find the folder's kernels for these jobs on this machine, one each."""
    from fastdiff.kernels import cached

    if arch not in shipped.compilers:
        known = ", ".join(f"sm_{known}" for known in shipped.compilers)
        return [f"it has kernels for {known}, and this GPU is sm_{arch}"]
    there, here = shipped.compilers[arch], cached.compiler_of(arch)
    if there["Triton"] != here["Triton"]:  # every other difference follows from this one
        return [f"Triton is {there['Triton']} there and {here['Triton']} here"]
    found = [
        f"{name} differ{'' if name.endswith('files') else 's'}"
        for name in here
        if there.get(name) != here[name]
    ]
    sources = {f"{job.module}.{job.kernel}": cached.hash_of(kernel_of(job)) for job in jobs}
    found += [
        f"the source of {name.rpartition('.')[2]} differs"
        for name, hash_ in sorted(sources.items())
        if name in shipped.sources and shipped.sources[name] != hash_
    ]
    return found


def install(shipped: Shipped, arch: int) -> None:
    """Copy the folder's kernels for an architecture into Triton's cache, if it does not have them.

    Raises UserError if a file is damaged or the cache cannot be written.
    """
    from fastdiff.kernels import cached

    for kernel in shipped.kernels:
        cubin, metadata, listed = cached.files_of(kernel.kernel.rpartition(".")[2])
        folder = cached.folder() / kernel.key
        if kernel.arch != arch or (folder / listed).is_file():
            continue
        for name, file in ((cubin, kernel.cubin), (metadata, kernel.metadata)):
            _put(folder / name, _bytes(shipped.folder, file))
        paths = {name: str(folder / name) for name in (cubin, metadata)}
        # last, since Triton looks this file up first
        _put(folder / listed, json.dumps({"child_paths": paths}).encode())
    for module in shipped.modules:
        path = cached.folder() / module.key / f"{module.name}{cached.SUFFIX}"
        if not path.is_file():
            _put(path, _bytes(shipped.folder, module.binary))


def _parsed(folder: Path, told: dict[str, Any]) -> Shipped:
    def file(value: dict[str, str]) -> File:
        made = File(**value)
        if Path(made.file).name != made.file:
            raise ValueError(f"the file {made.file!r}")
        return made

    def key(value: str) -> str:
        if not re.fullmatch(r"[A-Z2-7]{52}", value):
            raise ValueError(f"the key {value!r}")
        return value

    kernels = [
        Compiled(
            int(each["arch"]),
            str(each["kernel"]),
            key(each["key"]),
            file(each["cubin"]),
            file(each["metadata"]),
        )
        for each in told["kernels"]
    ]
    modules = [
        Module(str(each["name"]), key(each["key"]), file(each["binary"]))
        for each in told["modules"]
    ]
    if any(not re.fullmatch(r"\w+", module.name) for module in modules):
        raise ValueError("the name of a module")
    if any(not re.fullmatch(r"[\w.]+", kernel.kernel) for kernel in kernels):
        raise ValueError("the name of a kernel")
    compilers = {int(arch): dict(compiler) for arch, compiler in told["compilers"].items()}
    if any("Triton" not in compiler for compiler in compilers.values()):
        raise ValueError("no version of Triton")
    return Shipped(
        folder, str(told["of"]), compilers, dict(told["sources"]), tuple(kernels), tuple(modules)
    )


def _copied(source: Path, to: Path) -> File:
    data = source.read_bytes()
    to.write_bytes(data)
    return File(to.name, hashlib.sha256(data).hexdigest())


def _bytes(folder: Path, file: File) -> bytes:
    path = folder / file.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {AGAIN}") from error
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise UserError(f"{path} is damaged: its hash differs from the manifest's; {AGAIN}")
    return data


def _put(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror or error}") from error
    write_file(path, lambda temporary: temporary.write_bytes(data))
