"""Writes the Triton kernels as a repository that Hugging Face's `kernels` library loads.

python tools/hub_kernels.py build/hub-kernels

The folder holds `build/torch-cuda` (Triton) and `build/torch-cpu` (the same operators in plain
torch), a README and the licence. `kernels.get_local_kernel(Path("build/hub-kernels"))` loads it.
`hf upload OWNER/fastdiff-kernels build/hub-kernels --repo-type kernel` publishes it. None of it is
in git: every file is one of `fastdiff/kernels/`, with relative imports, as the library requires.
"""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path

from fastdiff.errors import UserError
from fastdiff.written import write_text

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "fastdiff/kernels"
OPS = tuple(sorted(path.parent.name for path in KERNELS.glob("*/gpu.py")))
"""Every operator with a Triton kernel: its folder and its public function have one name."""
NAME, VERSION, LOADER = "fastdiff-kernels", 1, "0.17.0"
"""The repository's id; the version that its users request; the oldest library that loads it."""
BACKENDS = ("cuda", "cpu")

_IMPORT = re.compile(r"^( *)from fastdiff\.kernels(\S*) import", re.M)
_STRING = re.compile(r'"fastdiff\.kernels(\.[\w.]+)"')


def needed() -> list[Path]:
    """The files of `OPS` and everything that they import, in order of their paths."""
    todo = [KERNELS / op / "__init__.py" for op in OPS]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += [file for name in _names(path) if (file := _file(name)) is not None]
    return sorted(found - {KERNELS / "__init__.py"})


def _names(path: Path) -> set[str]:
    """Dotted names that a file imports, or hands on to be imported."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {name for name in names if re.fullmatch(r"fastdiff\.[\w.]+", name)}


def _file(name: str) -> Path | None:
    """The file of a module; None for a name within one."""
    path = ROOT / name.replace(".", "/")
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def relative(text: str, depth: int) -> str:
    """A module's text with imports relative to the package's top, `depth` folders above it.

    Raises UserError if it imports another part of fastdiff, which no such package may.
    """

    def imports(found: re.Match[str]) -> str:
        indent, rest = found.groups()
        return f"{indent}from {'.' * (depth + 1)}{rest.removeprefix('.')} import"

    text = _IMPORT.sub(imports, text)
    text = _STRING.sub(r'__name__.partition(".")[0] + "\1"', text)
    if left := re.search(r"^ *(from|import) fastdiff.*", text, re.M):
        raise UserError(f"a kernel imports a module that is not a kernel: {left[0].strip()}")
    return text


def package() -> dict[str, str]:
    """The package's files: text by path."""
    files = {}
    for path in needed():
        own = path.relative_to(KERNELS)
        files[str(own)] = relative(path.read_text(encoding="utf-8"), len(own.parts) - 1)
    tables = sorted((KERNELS / "tables").glob("sm_*.json"))
    files |= {f"tables/{path.name}": path.read_text(encoding="utf-8") for path in tables}
    exported = "".join(f"from .{op} import {op}\n" for op in OPS)
    names = ", ".join(f'"{name}"' for name in (*OPS, "implementation"))
    files["__init__.py"] = (
        '"""Kernels of diffusion models; the docstring of each is its manual."""\n\n'
        f"{exported}from .dispatch import implementation\n\n__all__ = [{names}]\n"
    )
    return files


def metadata(files: dict[str, str], backend: str) -> dict[str, object]:
    """The metadata that the library reads first. `id` becomes the package's name, and the
    namespace of its operators in torch, so that several versions can be loaded at once."""
    text = json.dumps(files, sort_keys=True).encode()
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend}_{hashlib.sha256(text).hexdigest()[:10]}",
        "version": VERSION,
        "kernels-minver": LOADER,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def readme() -> str:
    """The repository's card."""
    names = "\n".join(f"- `{op}`" for op in OPS)
    return f"""---
license: apache-2.0
library_name: kernels
tags: [kernels, triton, diffusers]
---

# {NAME}

The Triton kernels of fastdiff, which makes diffusers' pipelines fast without changing what they
draw:

{names}

```python
from kernels import get_kernel

ops = get_kernel("OWNER/{NAME}", version={VERSION}, trust_remote_code=True)
y, _ = ops.ada_norm(x, 1e-6, scale=scale, shift=shift)  # x [B, L, D] on a GPU
help(ops.ada_norm)
```

They want Python 3.11, torch 2.11 and triton 3.6, or newer. On a CPU the same operators run in plain
torch. Written by `tools/hub_kernels.py`.
"""


def main(out: Path) -> None:
    """Write the repository to a folder that is new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give a new folder")
    files = package()
    repository = {"README.md": readme(), "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8")}
    for backend in BACKENDS:
        variant = f"build/torch-{backend}"
        repository |= {f"{variant}/{name}": text for name, text in files.items()}
        about = json.dumps(metadata(files, backend), indent=2)
        repository[f"{variant}/metadata.json"] = about + "\n"
    for name, text in repository.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(out / name, text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder to write: python tools/hub_kernels.py build/hub-kernels")
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(str(error))
