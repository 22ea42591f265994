"""The package for Hugging Face's `kernels` library: it is written, loaded by that library and run
in Triton's interpreter, in the same process as fastdiff."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff.kernels.contract import judge
from fastdiff.kernels.dispatch import all_kernels

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, ROOT / "tools/hub_kernels.py"]
STANDARD = {*sys.stdlib_module_names, "torch", "triton"}
"""The modules that the package may import."""
WITH_TRITON = {name for name, kernel in all_kernels().items() if "triton" in kernel.implementations}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "kernels"
    subprocess.run([*SCRIPT, out], check=True)
    return out


@pytest.fixture(scope="module", params=["torch-cpu", "torch-cuda"])
def loaded(request, repository):
    """The package of a variant, loaded by the library: from the repository if the variant fits this
    machine's torch, otherwise from the variant's folder."""
    from kernels import get_local_kernel

    here = request.param == "torch-cpu" and torch.version.cuda is None
    return get_local_kernel(repository if here else repository / "build" / request.param)


def ada_norm():
    """Arguments of ada_norm, and want(cast): the expected result in the dtype of `cast`."""
    x = torch.randn(2, 33, 48)
    scale, shift = torch.randn(2, 48), torch.randn(2, 48)

    def want(cast):
        normed = F.layer_norm(cast(x), (48,), eps=1e-6)
        return normed * (1 + cast(scale)[:, None]) + cast(shift)[:, None]

    return {"x": x, "eps": 1e-6, "scale": scale, "shift": shift}, want


def test_the_library_loads_the_package_and_it_computes(loaded):
    given, want = ada_norm()
    eager, exact = want(torch.clone), want(torch.Tensor.double)
    triton = loaded.implementation("ada_norm", "triton")
    for run in (loaded.ada_norm, triton):
        got, _ = run(**given)
        verdict = judge("ada_norm", got, eager, exact)
        assert verdict.passed, verdict
    assert triton.__wrapped__.planner.__module__ == f"{loaded.__name__}.ada_norm.gpu"


def test_the_package_is_independent_of_fastdiff(loaded, demo):
    """Its ops have their own namespace, and its modules are its own."""
    assert loaded.__name__.startswith("_fastdiff_kernels_")
    assert hasattr(torch.ops.fastdiff, "ada_norm")
    assert torch.ops.fastdiff.ada_norm is not getattr(torch.ops, loaded.__name__).ada_norm
    assert loaded.ada_norm.__doc__ == fastdiff.kernels.ada_norm.ada_norm.__doc__
    assert set(loaded.__all__) == WITH_TRITON | {"implementation"}
    for name in WITH_TRITON:
        assert getattr(loaded, name).__module__ == f"{loaded.__name__}.{name}"


def test_each_op_has_its_triton_kernel(loaded):
    for name in WITH_TRITON:
        assert loaded.implementation(name, "triton").__wrapped__.planner is not None


def test_files_import_only_torch_triton_and_each_other(repository):
    from kernels import Metadata

    for variant in (repository / "build").iterdir():
        about = Metadata.read_from_file(variant / "metadata.json")
        assert about.id.isidentifier()
        assert f"torch-{about.backend.backend_type}".lower() == variant.name
        for path in variant.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in getattr(node, "names", [])]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module] if node.level == 0 else []
                elif not isinstance(node, ast.Import):
                    continue
                assert {name.partition(".")[0] for name in names} <= STANDARD, path
    ids = {json.loads(path.read_text())["id"] for path in repository.rglob("metadata.json")}
    assert len(ids) == 2
    assert "trust_remote_code" in (repository / "README.md").read_text()


def test_a_folder_in_use_is_refused(repository):
    done = subprocess.run([*SCRIPT, repository], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"{repository} exists and is not empty; give a new folder\n"
