"""Which package may import which, where optional ones may be imported, how long files may be."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdiff"
FILES = sorted(PACKAGE.rglob("*.py"))

# package -> packages of ours that it may import
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "runtime": {"kernels", "models"},
    "families": {"kernels", "models", "runtime"},
    "engines": {"kernels", "models", "runtime", "families"},
    "export": {"kernels", "families", "engines"},
    "compiler": {"kernels", "models", "runtime", "families", "engines", "export"},
    "demo": set(),
    "batching": {"models", "runtime", "families", "compiler"},
    "bench": {"kernels", "models", "runtime", "families", "compiler", "demo"},
    "bulk": {"kernels", "models", "runtime", "compiler", "demo", "batching", "bench"},
    "regression": {"kernels", "models", "runtime", "compiler", "demo", "bench"},
    "serve": {"batching", "bench"},
}
ALL_MAY_IMPORT = {
    *("devices", "errors", "installed", "jsonable", "plans", "recipes", "tables", "workers"),
    *("written", "__version__"),
}
# optional package -> the only files that may import it
OPTIONAL = {
    "triton": (
        *("kernels/*/gpu.py", "kernels/*/launches.py", "kernels/*/tiles.py", "kernels/inspect.py"),
        *("kernels/cached.py", "kernels/worker.py"),
    ),
    "diffusers": (
        *("families/*.py", "compiler/loop_call.py", "compiler/denoise.py"),
        *("demo/*.py", "bench/preset*.py", "bench/pipelines.py", "regression/suite_*.py"),
        *("bench/blueprints.py", "bench/saved.py"),
    ),
    "transformers": ("demo/*.py", "bench/preset*.py", "bench/pipelines.py"),
    "tensorrt": ("engines/trt.py",),
    "tensorrt_rtx": ("engines/trt.py",),
    "onnx": ("export/*.py",),
    "onnxscript": ("export/*.py",),
    "tritonclient": ("export/triton.py",),
    "google": ("export/triton.py",),
    "onnxruntime": ("engines/ort.py",),
    "openvino": ("engines/openvino.py",),
    "greenlet": ("batching/drawing.py",),
    "matplotlib": ("regression/reports/plots.py", "regression/reports/svg.py"),
    "pyarrow": ("bulk/prompts.py",),
    "ray": ("bulk/cluster.py", "serve/replicas.py"),
    "jinja2": ("regression/reports/page.py",),
    "fastapi": ("serve/app.py", "serve/run.py"),
    "starlette": ("serve/app.py", "serve/answers.py"),
    "uvicorn": ("serve/run.py",),
    "prometheus_client": ("serve/metrics.py",),
}


@cache
def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_dependency_direction():
    faults = {}
    for path in FILES:
        own = path.relative_to(PACKAGE).parts[0]
        if own not in MAY_IMPORT:  # top-level modules tie the packages together
            continue
        allowed = MAY_IMPORT[own] | ALL_MAY_IMPORT | {own}
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("fastdiff.")}
        if not ours <= allowed:
            faults[str(path.relative_to(PACKAGE))] = f"imports {ours - allowed}"
    assert faults == {}


def test_optional_packages_stay_in_their_files():
    faults = {}
    for path in FILES:
        relative, roots = path.relative_to(PACKAGE), {name.split(".")[0] for name in imported(path)}
        for package in roots & OPTIONAL.keys():
            if not any(relative.match(pattern) for pattern in OPTIONAL[package]):
                faults[str(relative)] = package
    assert faults == {}


def test_files_stay_short():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_networks_run_without_optional_packages():
    """In a process that cannot import them, kernels and models import and compute."""
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(OPTIONAL)!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch, fastdiff, fastdiff.models
from fastdiff.kernels.attention import attention
q = torch.randn(1, 5, 2, 40)
want = torch.softmax(torch.einsum("bihk,bjhk->bhij", q, q) / 40**0.5, -1)
torch.testing.assert_close(attention(q, q, q), torch.einsum("bhij,bjhk->bihk", want, q))
try:
    fastdiff.compile(torch.nn.Linear(1, 1))
except ImportError as error:
    assert "pip install 'fastdiff-engine[diffusers]'" in str(error), error
else:
    raise SystemExit("compile ran without diffusers")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
