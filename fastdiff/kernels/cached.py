"""Triton's cache of compiled kernels: the keys of launches, and the files under a key.

The key is Triton's own: a hash of the kernel's source, the compiler and its assembler, the
architecture, the options and the environment. So a file under it was made from exactly these.
"""

import base64
import hashlib
import json
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.build import platform_key
from triton.runtime.cache import get_cache_key, triton_key
from triton.runtime.jit import create_function_from_signature

from fastdiff.kernels.jobs import Job, launch_of

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
LAUNCHER, UTILITIES = "__triton_launcher", "cuda_utils"


def target(arch: int) -> GPUTarget:
    """An NVIDIA GPU of an architecture, as Triton's driver describes it."""
    return GPUTarget("cuda", arch, 32)


@cache
def backend(arch: int) -> Any:
    """Triton's compiler for an architecture."""
    return make_backend(target(arch))


def folder() -> Path:
    """The folder of Triton's cache in this process."""
    return Path(knobs.cache.dir)


def source_of(job: Job) -> ASTSource:
    """The source that Triton's launcher compiles for a job."""
    return _packed(job)[0]


def key_of(job: Job) -> str:
    """The name in Triton's cache under which the job's launches look up their kernel."""
    source, options = _packed(job)
    env = get_cache_invalidating_env_vars()
    key = get_cache_key(source, backend(job.arch), options, env)
    return name_of(hashlib.sha256(key.encode()).hexdigest())


def name_of(hash_: str) -> str:
    """The name of a folder in Triton's cache, from a hexadecimal hash."""
    return base64.b32encode(bytes.fromhex(hash_)).decode().rstrip("=")


def files_of(kernel: str) -> tuple[str, str, str]:
    """The files that a launch reads from its key's folder: machine code, metadata, and the list of
    both, which it looks up first."""
    short = kernel[:150]  # as Triton shortens it
    return f"{short}.cubin", f"{short}.json", f"__grp__{short}.json"


def holds(job: Job) -> bool:
    """Whether a launch of the job would find everything it needs in the cache."""
    cubin, metadata, listed = files_of(job.kernel)
    try:
        paths = json.loads((folder() / key_of(job) / listed).read_bytes())["child_paths"]
    except (OSError, ValueError, KeyError):
        return False
    there = all(name in paths and Path(paths[name]).is_file() for name in (cubin, metadata))
    return there and all(
        (folder() / key_of_module(source) / f"{name}{SUFFIX}").is_file()
        for name, source in modules_of(job).items()
    )


def modules_of(job: Job) -> Mapping[str, str]:
    """C sources that Triton compiles before it starts a kernel, by the Python module's name.

    Triton 3.6 compiles a launcher per signature, a third of a second each; later versions do not.
    """
    if not hasattr(nvidia, "make_launcher"):
        return {}
    launcher: str = nvidia.make_launcher({}, source_of(job).signature, None)
    return {UTILITIES: _utilities(), LAUNCHER: launcher}


def key_of_module(source: str) -> str:
    """The name of a C module in Triton 3.6's cache."""
    return name_of(hashlib.sha256((source + platform_key()).encode()).hexdigest())


def compiler_of(arch: int) -> dict[str, str]:
    """The parts of a key besides the kernel and its launch, each with a description."""
    return {
        "Triton": triton.__version__,
        "Triton's files": hashlib.sha256(triton_key().encode()).hexdigest(),
        "the assembler": str(backend(arch).hash()),
        "the environment": str(sorted(get_cache_invalidating_env_vars().items())),
    }


def hash_of(kernel: Any) -> str:
    """The hash of a kernel's source and of every function that it calls."""
    return str(kernel.cache_key)


@cache
def _utilities() -> str:
    return Path(nvidia.dirname, "driver.c").read_text()


def _packed(job: Job) -> tuple[ASTSource, Any]:
    """A job's source and options, put together by Triton's own launcher, since versions differ."""
    launch, compiler = launch_of(job), backend(job.arch)
    kernel, told = launch.kernel, {**launch.options}
    told["debug"] = kernel.debug or knobs.runtime.debug
    for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):  # the second since 3.9
        if hasattr(knobs.compilation, name):
            told[name] = getattr(knobs.compilation, name)
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    bound, specialization, _ = bind(**launch.arguments, **launch.constants, **told)
    packed = kernel._pack_args(compiler, told, bound, specialization, None)
    options, signature, constants, attributes = packed
    return ASTSource(kernel, signature, constants, attributes), options
