"""The pipeline that a command line names: a folder, hub id, single file, preset or the demo."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastdiff import installed
from fastdiff.bench.saved import SUFFIX
from fastdiff.errors import UserError, first_line

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
URL = re.compile(r"https://(huggingface\.co|hf\.co)/.+")


@dataclass(frozen=True)
class Source:
    """How to open a pipeline: by `pipeline`, by `preset` and `scale`, or neither for the demo."""

    pipeline: str | None = None
    preset: str | None = None
    scale: float = 1.0
    variant: str | None = None
    config: str | None = None
    lora: tuple[str, ...] = ()
    """Each "LORA" or "LORA=WEIGHT"."""
    scheduler: str | None = None

    @property
    def name(self) -> str:
        """The name that a table's title begins with."""
        if self.preset:
            return f"{self.preset} scale {self.scale:g}"
        place = placed(self.pipeline)
        if place is None:
            return DEMO
        if isinstance(place, str):
            return place
        return place.stem if is_file(place) else Path(os.path.abspath(place)).name

    def check(self) -> None:
        """UserError if two of them contradict each other, or name nothing that can be opened."""
        if self.pipeline and self.preset:
            raise UserError(
                f"got the pipeline {self.pipeline} and --preset {self.preset}; give one of them"
            )
        if self.scale != 1.0 and not self.preset:
            raise UserError("--scale needs --preset; the widths of a pipeline are fixed")
        place = None if self.preset else placed(self.pipeline)
        if self.variant and (place is None or is_file(place)):
            raise UserError("--variant needs a folder or a hub id, which may hold several variants")
        if self.config and (place is None or not is_file(place)):
            raise UserError(
                f"--config needs a {SUFFIX} file; a folder or hub id has its own configs"
            )
        for one in self.lora:
            adapter(one)


def placed(pipeline: str | None) -> Path | str | None:
    """The place of a pipeline: an existing folder or file, or a hub id or address as given; None
    for the demo. UserError for anything else, and for files that are not safetensors."""
    if pipeline is None or (pipeline == DEMO and not Path(DEMO).exists()):
        return None
    path = Path(pipeline)
    if path.is_dir():
        return path
    if path.is_file() or URL.fullmatch(pipeline):
        if not pipeline.endswith(SUFFIX):
            raise UserError(
                f"{pipeline} is not a {SUFFIX} file; other files of weights are pickles, which can"
                " run any code and are never read"
            )
        return path if path.is_file() else pipeline
    if HUB_ID.fullmatch(pipeline) and not pipeline.endswith(SUFFIX):
        return pipeline
    raise UserError(
        f"{pipeline} is neither an existing folder or {SUFFIX} file nor a hub id (owner/name)"
    )


def is_file(place: Path | str) -> bool:
    """Whether it is a single file rather than a folder or a hub id."""
    return str(place).endswith(SUFFIX) and not (isinstance(place, Path) and place.is_dir())


def opened(source: Source, dtype: Any, device: str, to_export: bool = False) -> Any:
    """The pipeline: a preset on `device`, any other on the CPU. to_export: also of a folder that
    draws from a picture, if it can be exported.

    Raises UserError if it cannot be opened, or does not take the requested scheduler or LoRA.
    """
    source.check()
    if source.preset:
        from fastdiff.bench.presets import build

        pipe: Any = build(source.preset, source.scale, dtype, device)
    else:
        pipe = _loaded(source, dtype, to_export)
    if source.scheduler:
        reschedule(pipe, source.scheduler)
    if source.lora:
        _adapt(pipe, source.lora)
    return pipe


def _loaded(source: Source, dtype: Any, to_export: bool) -> Any:
    from fastdiff.bench import pipelines

    place = placed(source.pipeline)
    if place is None:
        from fastdiff.demo import load_demo

        return load_demo(dtype, "cpu")
    if is_file(place):
        return pipelines.load_file(place, source.config, dtype)
    folder = pipelines.on_disk(place, source.variant)
    return pipelines.load(folder, dtype, "cpu", source.variant, to_export)


def folder_of(pipeline: str | None, command: str) -> Path | None:
    """The folder of a pipeline, downloaded if it is a hub id; None for the demo.
    UserError for a single file, which `command` cannot take."""
    place = placed(pipeline)
    if place is None:
        return None
    if is_file(place):
        raise UserError(
            f"{command} takes a folder or a hub id; load {place} with from_single_file and save it"
            " with save_pretrained"
        )
    from fastdiff.bench.pipelines import on_disk

    return on_disk(place, None)


def reschedule(pipe: Any, name: str) -> None:
    """Give the pipeline another scheduler. UserError if its network cannot use it."""
    pipe.scheduler = rescheduled(pipe, name)


def rescheduled(pipe: Any, name: str) -> Any:
    """A scheduler of this name, made from the config of the pipeline's. UserError if its network
    cannot use it."""
    from fastdiff.bench import pipelines

    takes = pipelines.schedulers(pipe)
    if name not in takes:
        raise UserError(
            f"--scheduler is {name!r}; a {type(pipe).__name__} with a"
            f" {type(pipe.scheduler).__name__} takes {', '.join(takes)}"
        )
    config = dict(pipe.scheduler.config)
    # PNDM's first steps by Runge-Kutta, which Stable Diffusion was published without
    return takes[name].from_config({"skip_prk_steps": True} | config)


def adapter(text: str) -> tuple[str, float]:
    """The place of an adapter and its weight, from "LORA" or "LORA=WEIGHT"."""
    place, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        place, weight = text, "1"
    try:
        value = float(weight)
    except ValueError:
        raise UserError(f"--lora {text}: {weight!r} is not a number; give LORA=0.8") from None
    path = Path(place)
    if path.is_file() and path.suffix != SUFFIX:
        raise UserError(f"--lora {place} is not a {SUFFIX} file; pickles are never read")
    if not path.exists() and (not HUB_ID.fullmatch(place) or place.endswith(SUFFIX)):
        raise UserError(
            f"--lora {place} is neither an existing folder or {SUFFIX} file nor a hub id"
        )
    return place, value


def _adapt(pipe: Any, loras: tuple[str, ...]) -> None:
    """Load the adapters, and switch all of them on."""
    if find_spec("peft") is None:
        raise UserError(f"--lora needs peft, which is not installed; {installed.pip('lora')}")
    from fastdiff.demo import quiet

    weights: dict[str, float] = {}
    for text in loras:
        place, weight = adapter(text)
        path, more = Path(place), {}
        if path.is_file():
            place, more = str(path.parent), {"weight_name": path.name}
        name = f"lora{len(weights)}"
        weights[name] = weight
        try:
            with quiet():
                pipe.load_lora_weights(place, adapter_name=name, use_safetensors=True, **more)
                pipe.set_adapters(list(weights), list(weights.values()))
        except Exception as error:  # a foreign file can be wrong in any way: say which, and how
            raise UserError(f"--lora {text} cannot be loaded: {first_line(error)}") from error


def fused(source: Source, dtype: Any) -> Any:
    """As `opened` on the CPU, with its adapters added to the weights, as an export needs."""
    pipe = opened(source, dtype, "cpu", to_export=True)
    if source.lora:
        taken = [name for name in pipe._lora_loadable_modules if getattr(pipe, name, None)]
        pipe.fuse_lora(components=taken)
        pipe.unload_lora_weights()
    return pipe
