"""TensorRT and TensorRT-RTX by one code path: builds plans from ONNX, and loads them."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastdiff import installed
from fastdiff.engines import manifest
from fastdiff.engines.manifest import Manifest, Profile
from fastdiff.engines.monitor import Watch, interruptible, monitor
from fastdiff.errors import UserError

FLAVORS = {"tensorrt": ("tensorrt", "trt"), "rtx": ("tensorrt_rtx", "trt-rtx")}
"""The module of each flavor, and the extra that installs it."""
COMPATIBLE = ("hardware", "version")


@dataclass(frozen=True)
class Order:
    """The requested properties of a plan.

    compatible: one of COMPATIBLE. hardware: the plan runs on every GPU from sm_80 on. version:
    later versions' lean runtime can read it (that runtime is left out of the plan, since it is host
    code).
    timing_cache: a file that is read, if it exists, and written after the build.
    """

    target: str
    profile: Profile
    compatible: Sequence[str] = ()
    timing_cache: Path | None = None


def library(flavor: str) -> Any:
    """The module of a flavor. UserError if it is not installed."""
    module, extra = FLAVORS[flavor]
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{flavor} needs {module} ({error}); {installed.pip(extra)}") from error


def here(device: int = 0) -> str | None:
    """The present GPU as a target, such as sm_89; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def named(trt: Any) -> dict[str, Any]:
    """The targets that a library can build for without that GPU; TensorRT has none."""
    if not hasattr(trt.IBuilderConfig, "set_compute_capability"):
        return {}
    members = trt.ComputeCapability.__members__.items()
    return {f"sm_{name[2:]}": value for name, value in members if name.startswith("SM")}


def choose(flavor: str, targets: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A flavor that builds for all targets, and the targets; by default the present GPU.

    flavor: one of FLAVORS, or "auto" for the first installed one that can.

    UserError if the flavor is not installed, or supports a target no more than this machine does.
    """
    if flavor not in ("auto", *FLAVORS):
        raise UserError(f"--flavor is {flavor!r}; choose auto, {' or '.join(FLAVORS)}")
    if flavor != "auto":
        return flavor, _check_targets(flavor, targets)
    refusals = []
    for one in FLAVORS:
        try:
            return one, _check_targets(one, targets)
        except UserError as error:
            refusals.append(str(error))
    raise UserError("; ".join(refusals))


def _check_targets(flavor: str, targets: Sequence[str]) -> tuple[str, ...]:
    known, own = tuple(named(library(flavor))), here()
    which = f"knows {', '.join(known)}" if known else "builds only for the present GPU"
    if not targets and own is None:
        raise UserError(
            f"there is no GPU here to build for; name one with --target: {flavor} {which}"
        )
    for target in targets:
        if target not in (*known, own):
            raise UserError(f"{flavor} cannot build for {target} here: it {which}")
    return tuple(dict.fromkeys(targets)) or (str(own),)


def check(flavor: str, order: Order) -> None:
    """UserError if the library does not support the order; checks before minutes of work."""
    trt = library(flavor)
    _configure(trt, trt.Builder(_log(trt)).create_builder_config(), flavor, order)


def build(flavor: str, onnx: Path, order: Order, watch: Watch) -> Any:
    """The plan of an ONNX file, as a buffer; its dtypes are the file's.

    Raises:
        UserError: the library cannot read the file, support the order, or build; in its own words.
        KeyboardInterrupt: on Ctrl-C, once the library has reached its next step.
    """
    trt = library(flavor)
    log = _log(trt)
    builder = trt.Builder(log)
    # without this TensorRT 10 chooses dtypes itself; later versions do not need it
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        found = parser.get_error(0).desc() if parser.num_errors else log.why()
        raise UserError(f"{flavor} cannot read {onnx.parent.name}: {found}")
    config = builder.create_builder_config()
    timings = _configure(trt, config, flavor, order)
    profile = builder.create_optimization_profile()
    for name, shapes in order.profile.items():
        profile.set_shape(name, shapes["min"], shapes["opt"], shapes["max"])
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"{flavor} refuses the shapes of {onnx.parent.name}: {log.why()}")
    progress = config.progress_monitor = monitor(trt, watch)
    with interruptible(progress):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{flavor} cannot build {onnx.parent.name} for {order.target}: {log.why()}")
    if order.timing_cache is not None:
        with _file_errors(order.timing_cache):
            partial = order.timing_cache.with_name(f".{order.timing_cache.name}.partial")
            partial.write_bytes(timings.serialize())
            partial.replace(order.timing_cache)
    return plan


def library_of(folder: Path, made: Manifest) -> Any:
    """The library that built the engine in `folder`. UserError if another is installed."""
    if made.flavor not in FLAVORS:
        raise UserError(f"{folder} was built by {made.flavor}; expected {' or '.join(FLAVORS)}")
    trt = library(made.flavor)
    if trt.__version__ != made.version:
        raise UserError(
            f"{folder} was built by {made.flavor} {made.version}, but {trt.__version__} is"
            f" installed; {manifest.AGAIN}"
        )
    return trt


def load(folder: Path, device: torch.device) -> Any:
    """The engine in `folder` on a GPU: the library's own ICudaEngine, without any host code.

    UserError unless manifest, library, GPU and hash match; it names what differs and what to do.
    """
    made = manifest.read(folder)
    trt = library_of(folder, made)
    if device.type != "cuda" or (gpu := here(device.index or 0)) is None:
        raise UserError(f"{folder} needs an NVIDIA GPU ({made.target}), and there is none here")
    ampere = "hardware" in made.compatible and int(gpu[3:]) >= 80
    if gpu != made.target and not ampere:
        raise UserError(
            f"{folder} was built for {made.target}, but this GPU is {gpu};"
            f" run fastdiff export --trt with --target {gpu}"
        )
    runtime, log = _runtime(trt)
    with torch.cuda.device(device):
        engine = runtime.deserialize_cuda_engine(manifest.plan(folder, made))
    if engine is None:
        raise UserError(f"{made.flavor} cannot load {folder}: {log.why()}")
    return engine


@cache
def _runtime(trt: Any) -> tuple[Any, Any]:
    """A library's runtime and its log; one per process, since it must outlive every engine."""
    log = _log(trt)
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = False
    return runtime, log


def _configure(trt: Any, config: Any, flavor: str, order: Order) -> Any:
    """Apply the order. Returns the timing cache in use, if any; UserError if one is refused."""
    if known := named(trt):
        config.num_compute_capabilities = 1
        target = known.get(order.target, trt.ComputeCapability.CURRENT)
        config.set_compute_capability(target, 0)
    if "hardware" in order.compatible:
        level = config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        # TensorRT-RTX only logs a warning about it
        if config.hardware_compatibility_level != level:
            raise UserError(f"{flavor} has no --compatible hardware; give each GPU as a --target")
    # otherwise TensorRT-RTX's engines may allocate as they run, which a CUDA graph cannot hold
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if "version" in order.compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    return _timing_cache(config, flavor, order.timing_cache)


def _timing_cache(config: Any, flavor: str, file: Path | None) -> Any:
    """The cache that the build uses and fills, if any. UserError if the library keeps none."""
    if file is None:
        return None
    with _file_errors(file):
        content = file.read_bytes() if file.exists() else b""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        timings = config.create_timing_cache(content)
        taken = timings is not None and config.set_timing_cache(timings, False)
    if any(issubclass(one.category, DeprecationWarning) for one in told):  # "no-ops", it says
        raise UserError(f"{flavor} keeps no timing cache; leave out --timing-cache")
    if not taken:
        raise UserError(f"{file} is not a timing cache of this {flavor} and GPU; name a new file")
    return timings


@contextmanager
def _file_errors(file: Path) -> Iterator[None]:
    """Turn an OSError about a file into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error


def _log(trt: Any) -> Any:
    """A logger that keeps the library's errors and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def why(self) -> str:
            """The first error since the last call, in one line."""
            first = self.errors[0] if self.errors else "it does not say why"
            self.errors.clear()
            return " ".join(first.split())

    return Log()
