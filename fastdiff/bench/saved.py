"""A folder written by `save_pretrained`: all checks that need no weights."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.recipes import RECIPES, needs_picture

LCM = "LatentConsistencyModelPipeline"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""By library: the prefix of its weights' names. A component may also come from a module of
diffusers.pipelines, whose class is of either kind."""
LFS_POINTER = b"version https://git-lfs"
SUFFIX = ".safetensors"

# the files that a component's folder must hold, by the start of the component's name; other
# components are networks
_FILES: dict[str, tuple[str, ...]] = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
}


@dataclass(frozen=True)
class Network:
    """A component with weights: its folder, its class, and the variant of its files, None for files
    without one."""

    folder: Path
    library: str
    kind: str
    variant: str | None


@dataclass(frozen=True)
class Saved:
    """A checked folder, and the pipeline class to load it as."""

    folder: Path
    pipeline: str
    networks: tuple[Network, ...]
    absent: tuple[str, ...] = ()
    """Components that were saved as None; for some of them diffusers loads a folder only if it is
    told that they are None."""

    @property
    def variant(self) -> str | None:
        """The variant to load; diffusers takes plain files if a network has no such variant."""
        return next((net.variant for net in self.networks if net.variant), None)


def check_folder(folder: Path, variant: str | None = None, to_export: bool = False) -> Saved:
    """Raise UserError unless `folder` holds a complete pipeline that draws without a picture.

    variant: of the files to read; None: files without one, else the one that all networks have.
    to_export: take one that draws from a picture, too, if it can be exported.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a pipeline saved with save_pretrained()")
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    index = _read_json(index_file)
    pipeline = drawn_from_text(folder, index, to_export)
    networks: dict[str, tuple[str, str]] = {}
    for component, origin in index.items():
        if isinstance(origin, list) and len(origin) == 2 and origin[0] is not None:
            if not _is_library(str(origin[0])):
                raise UserError(
                    f"{index_file}: {component} comes from {origin[0]}, which is not a library;"
                    " save the pipeline again"
                )
            if _check_component(folder / component):
                networks[component] = (str(origin[0]), str(origin[1]))
    found = {name: _weights(folder / name, net[0]) for name, net in networks.items()}
    variant = _variant(folder, found, variant)
    for files in found.values():
        for file in files.get(variant) or files[None]:
            check_whole(file)
    for missing in sorted(set(RECIPES[pipeline].networks) - set(networks)):
        raise UserError(f"{folder} has no {missing}; save or copy the pipeline again")
    cls = _class(pipeline)
    if cls is None or not (to_export and needs_picture(cls)):
        _need_text_alone(folder, pipeline)
    return Saved(
        folder,
        pipeline,
        tuple(
            Network(folder / name, library, kind, variant if variant in found[name] else None)
            for name, (library, kind) in networks.items()
        ),
        tuple(name for name, origin in index.items() if origin == [None, None]),
    )


def drawn_from_text(place: Path | str, index: dict[str, Any], to_export: bool = False) -> str:
    """The class to load a pipeline as, by its model_index.json; UserError for an unknown one, or
    one that draws from a picture alone, unless it can be exported and `to_export` is set."""
    name = str(index.get("_class_name"))
    if name not in RECIPES:
        raise UserError(
            f"{place} holds a {name}, which fastdiff does not compute; docs/pipelines.md lists what"
            " it computes"
        )
    if index.get("requires_aesthetics_score"):
        raise UserError(f"{place} holds a refiner, which draws from a picture, not from text")
    if RECIPES[name].from_text:
        return RECIPES[name].from_text
    cls = _class(name)
    if cls is None:
        raise UserError(f"{place} holds a {name}; load it in Python, and call fastdiff.compile")
    if needs_picture(cls) and not (to_export and RECIPES[name].exported):
        raise UserError(f"{place} holds a {name}, which draws from a picture; call it from Python")
    return name


def need_no_picture(place: Path | str, name: str, config: Mapping[str, Any]) -> None:
    """UserError if the config of a denoising network says that it reads more than latents, such as
    the mask and picture of an inpainting model."""
    takes = config.get("in_channels")
    gives = config.get("out_channels") or takes
    if takes is None or gives is None or not takes > gives:
        return
    if takes != gives * (config.get("patch_size") or 1) ** 2:  # else it takes whole patches
        raise UserError(
            f"{place}: its {name} takes {takes} channels but latents have {gives}, so it draws"
            " from a picture, not from text alone"
        )


def _class(name: str) -> type | None:
    """The pipeline class of diffusers called `name`; None if it has none."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline):
        return cls
    return None


def _need_text_alone(folder: Path, pipeline: str) -> None:
    """UserError if the network that denoises draws from more than a text."""
    denoiser = RECIPES[pipeline].denoiser
    config = _read_json(folder / denoiser / "config.json")
    need_no_picture(folder, denoiser, config)
    if pipeline == LCM and config.get("time_cond_proj_dim") is None:
        raise UserError(
            f"{folder}: its U-Net has no time_cond_proj_dim, which a {LCM} needs; save it as a"
            f" StableDiffusionPipeline"
        )


def _is_library(name: str) -> bool:
    return name in STEMS or (name.isidentifier() and bool(find_spec(f"diffusers.pipelines.{name}")))


def _check_component(folder: Path) -> bool:
    """Whether the component is a network; UserError if a file is missing or not JSON."""
    files = next((f for kind, f in _FILES.items() if folder.name.startswith(kind)), None)
    for name in files or ("config.json",):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; save or copy the pipeline again")
    for path in sorted(folder.glob("*.json")):
        _read_json(path)
    return files is None


def _weights(folder: Path, library: str) -> dict[str | None, list[Path]]:
    """Weight files by variant. Only safetensors: .bin and .ckpt files are pickles, which can run
    any code when read."""
    of_models = any(folder.glob("model*"))
    stem = STEMS.get(library) or STEMS["transformers" if of_models else "diffusers"]
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob(f"{stem}*{SUFFIX}")):
        rest = path.name.removeprefix(stem).removesuffix(SUFFIX)
        variant = re.sub(r"-\d+-of-\d+", "", rest).removeprefix(".")
        found.setdefault(variant or None, []).append(path)
    for index_file in folder.glob(f"{stem}{SUFFIX}.index*.json"):
        for shard in _shards(index_file):
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard} is missing, though {index_file.name} names it")
    if found:
        return found
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt"))
    if pickles:
        raise UserError(
            f"{folder} holds only pickled weights ({pickles[0]}), which are never read; "
            "save it again with safe_serialization=True"
        )
    raise UserError(f"{folder} has no {SUFFIX} file; save or copy the pipeline again")


def _shards(index_file: Path) -> Iterator[str]:
    names = _read_json(index_file).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index_file} has no weight_map; save or copy the pipeline again")
    yield from sorted(set(names.values()))


def _variant(
    folder: Path, found: dict[str, dict[str | None, list[Path]]], asked: str | None
) -> str | None:
    """The variant to read: `asked`; else None if every network has files without a variant, else
    the variant that completes them."""
    if asked is not None:
        held = sorted({name for files in found.values() for name in files if name})
        if asked not in held:
            there = ", ".join(held) or "files without a variant only"
            raise UserError(f"--variant is {asked!r}; {folder} holds {there}")
        if lost := [name for name, files in found.items() if not {asked, None} & set(files)]:
            raise UserError(f"--variant is {asked!r}; the {lost[0]} of {folder} has no such file")
        return asked
    lacking = [set(files) for files in found.values() if None not in files]
    if not lacking:
        return None
    if common := set.intersection(*lacking):
        return min(name for name in common if name)
    names = (f"{name} as {'/'.join(map(str, v))}" for name, v in found.items() if None not in v)
    raise UserError(
        f"{folder} holds {', '.join(names)}, but no variant that every part has; save it again"
    )


def check_whole(path: Path) -> None:
    """UserError if a .safetensors file is damaged, or is a pointer to a file not fetched."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"{path} is a Git LFS pointer, not the weights that it stands for; run git lfs"
                    " pull"
                )
        with safe_open(path, framework="pt"):  # reads the positions of the tensors only
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}; save or copy it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
