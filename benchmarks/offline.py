"""Makes a checkout run without a network: `python benchmarks/offline.py FOLDER`.

It prepares the interpreter that runs it. Wheels in .whl/ are unpacked into FOLDER, which must be on
PYTHONPATH before the checkout. The C++ kernels are built into the checkout's own package, if there
is a compiler and the present build is older than its sources. Nothing else changes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.*")))


def unpack(wheels: list[Path], folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    target = ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(folder)]
    subprocess.run([*pip, *target, *map(str, wheels)], check=True)


def is_built(folder: Path) -> bool:
    """Whether this interpreter finds the C++ kernels, editable or newer than their sources."""
    module = ROOT / "fastdiff" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists() and module.stat().st_mtime < max(
        (ROOT / source).stat().st_mtime for source in SOURCES
    ):
        module.unlink()
    paths = os.pathsep.join((str(folder), str(ROOT)))
    import_it = [sys.executable, "-P", "-c", "import fastdiff._C"]
    done = subprocess.run(import_it, env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    return done.returncode == 0


def build() -> None:
    """Build with the installed CMake and pybind11; CalledProcessError if that fails."""
    folder = ROOT / "build" / f"offline-{sys.implementation.cache_tag}"
    asked = [sys.executable, "-m", "pybind11", "--cmakedir"]
    pybind11 = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    variables = (
        f"-Dpybind11_DIR={pybind11}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
    )
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *variables], check=True, stdout=sys.stderr)
    jobs = str(os.cpu_count())
    subprocess.run(["cmake", "--build", folder, "-j", jobs], check=True, stdout=sys.stderr)
    for module in folder.glob("_C*.so"):
        shutil.copy(module, ROOT / "fastdiff")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    if wheels := sorted(ROOT.glob(".whl/*.whl")):
        unpack(wheels, folder)
    if is_built(folder):
        return
    try:
        build()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the C++ kernels could not be built ({error}); continuing without", file=sys.stderr)


if __name__ == "__main__":
    main()
