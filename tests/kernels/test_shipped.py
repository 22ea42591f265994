"""Kernels that `fastdiff warm` compiled are found by Triton's own launcher, or named as missing.

The tests' own process has the kernels for Triton's interpreter, so others compile and start them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment

from fastdiff.errors import UserError
from fastdiff.kernels.shipped import MANIFEST, read

HERE = Path(__file__).parent
ARCH = 90

LAUNCHES = """
import sys, torch
sys.path.insert(0, {here!r})
from stub import Stub
from pathlib import Path
from fastdiff.bench.blueprints import of_preset
from fastdiff.compiler.adapters import parts
from fastdiff.compiler.asked import runs_of
from fastdiff.kernels import shipped
from fastdiff.kernels.jobs import job_of, kernel_of
from fastdiff.models import Loan
from fastdiff.runtime.planned import kernels_of

def launches(preset, arch=90):
    "Those of a picture, planned anew: not by way of a job."
    plan, networks = of_preset(preset), []
    for module, kind in (parts(plan.unet) | parts(plan.vae)).values():
        cast = torch.nn.Module.to(module, dtype=torch.float16)
        networks.append(kind.borrow(cast, Loan(cast, rehearsal=True)))
    runs = [r for u in plan.upcasts for r in runs_of(networks, plan.side, plan.factor, u)]
    return kernels_of(runs, arch)
"""


def python(code, cache, *arguments):
    """Standard output of a process that has fastdiff's kernels for GPUs, and a cache of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES.format(here=str(HERE)) + code, *map(str, arguments)],
        env=environment() | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def warm(out, *options):
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff", "warm", "--out", str(out), *options],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


START = """
shipped_folder, preset, arch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
shipped.install(shipped.read(shipped_folder), arch)
stub = Stub(arch)
asked = launches(preset, arch)
for launch in asked:
    launch.start()
assert len(stub.started) == len(asked) > 0, stub.started
print(len(asked), *stub.compiled)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The kernels of a small SD1.5."""
    return warm(tmp_path_factory.mktemp("warm") / "tiny", "--preset", "tiny", "--arch", str(ARCH))


@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
def test_a_fresh_process_compiles_none_of_a_pipelines_kernels(preset, tmp_path):
    """Triton's own launcher starts every planned launch, on a driver that starts nothing."""
    folder = warm(tmp_path / "kernels", "--preset", preset, "--arch", str(ARCH))
    count, *compiled = python(START, tmp_path / "cache", folder, preset, ARCH).split()
    assert int(count) > 10
    assert compiled == []
