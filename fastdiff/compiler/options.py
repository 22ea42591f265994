"""The options of `fastdiff.compile`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from fastdiff.errors import UserError

FASTDIFF = "fastdiff"
"""The backend that computes with kernels of our own."""
BACKENDS = (FASTDIFF, "ort", "openvino", "tensorrt")
TILINGS = ("auto", "exact")
GUIDANCE, DATA = "guidance", "data"
PARALLELS = (GUIDANCE, DATA)
LOOP = "loop"
"""The denoising loop's name beside the components'."""


@dataclass(frozen=True)
class Options:
    """Choices of `fastdiff.compile`. Every default is lossless: the picture stays the same.

    Attributes:
        ignore: parts that diffusers runs, by their names in `fastdiff.report` or by the
            component that they belong to: ("vae",), ("vae.decoder",), or ("loop",) for diffusers'
            own denoising loop around our networks.
            Gain: none in speed; a part that you patch yourself is left alone.
            Cost: these parts are as slow as before.
        backend: what computes the denoising network: "fastdiff" (our own kernels), "ort" (ONNX
            Runtime), "openvino" (on a CPU only) or "tensorrt" (TensorRT, or TensorRT for RTX).
            Gain: speed if that library is faster than our kernels; `fastdiff bench` shows it.
            Cost: the weights are stored in a file as well. After an edit of the weights, or with a
            LoRA, that network runs eagerly. "ort" and "openvino" export it first, which takes
            minutes, unless `engines` is given.
        engines: the folder that `fastdiff export` made from this pipeline, for the other backends;
            "tensorrt" needs one.
            Gain: nothing is exported at every start.
            Cost: the folder belongs to these weights; with other weights it is refused.
        ort_graphs: whether ONNX Runtime keeps a CUDA graph for every shape; needs "ort".
            Gain: fewer launches, which matters for small pictures.
            Cost: GPU memory for each shape that was drawn.
        warm: the folder that `fastdiff warm` made, with GPU kernels that need not be compiled here.
            Gain: on a new machine the first picture does not wait for kernels to be compiled.
            Cost: the folder belongs to one version of fastdiff and Triton, and holds code that
            runs: load only folders that you or people you trust made. Kernels that are missing in
            it are compiled, and the logger "fastdiff" says so.
        tactics: whether cuDNN measures its algorithms for a convolution that is too small to fill a
            GPU, when the convolution first runs. Off if torch is set to deterministic algorithms.
            Gain: faster steps for small pictures.
            Cost: time once per process; the report says how much.
        vae_tiling: how an autoencoder decodes pictures that take much memory. "auto": in one
            piece, and in strips only if a GPU runs out of memory. "exact": in strips whenever
            one piece would take more than 1 GiB. Strips draw the same picture up to rounding;
            diffusers' own `enable_tiling`, which changes the picture, overrides both.
            Gain of "exact": decoding takes 1 GiB or a quarter of the memory, whichever is more.
            Cost of "exact": up to 30% more time to decode.
        text_cache: how many outputs of each text encoder (CLIP, T5) are kept for later calls with
            the same tokens; 0: none. A picture with guidance calls each encoder twice. A kept
            output is valid for the present weights only: after an edit of them, with other adapters
            or settings, and on another device the encoder runs again. (A partial write through
            `.data` may go unnoticed.)
            Gain: a repeated prompt skips its text encoders, and if they are offloaded
            (`enable_model_cpu_offload`) their weights stay on the CPU.
            Cost: the outputs' memory, 0.5 MB for 77 tokens of SDXL's larger CLIP in float16,
            4 MB for 512 of SD3's T5, and all layers' outputs if the pipeline asks for them; a
            check of the weights for each call, and a copy of what is returned.
        offload_hoisted: whether weights that a picture needs only before its first step wait in
            pinned host memory between pictures: those that compute the modulation of all steps
            (SD3, FLUX, DiT), or the text's keys and values (PixArt); of FLUX.1's ControlNets, too.
            A picture copies them to the GPU a piece at a time. On a CPU nothing moves.
            Gain: GPU memory, a third of SD3.5's transformer (5.4 GB of SD3.5-large in half
            precision); the report says how much.
            Cost: the copy, once a picture, or once a step if the report says that diffusers
            runs the loop; as much host memory, rounded up to a power of two; the parameters are on
            the CPU, so restore before you call their layers yourself or torch.compile the network.
            Weights with LoRA adapters stay on the GPU.
        parallel: how the ranks of torch.distributed draw together; every rank makes the same calls.
            "guidance": each of two ranks computes one half of guidance in every step, and both run
            the same scheduler step. "data": each rank draws a part of a batch. Every rank gets all
            pictures.
            Gain: two GPUs, or two processors, for one picture; N for a batch.
            Cost: each rank holds the whole pipeline, encodes the text and decodes all pictures.
            Layers before the first text, which both halves share on one rank, are computed on
            both ranks. Each rank draws alone what cannot be shared, and the report says why.
        batch_invariant: whether a picture has the same bits however many are drawn with it, in one
            call or by `fastdiff.batching`: the loop then always computes four pictures, some of
            which may be empty, and a call draws at most four.
            Gain: a picture can be drawn again, bit by bit, whatever is drawn beside it.
            Cost: a single picture takes as long as four; on a CPU up to four times as long. Text
            encoders and the autoencoder compute the pictures of a call at once, and a library
            that computes them (torch's convolutions and products, transformers) may round
            differently for another number of pictures; a library in the loop may also round
            differently for another place in the batch. `fastdiff.batching` calls text encoders and
            autoencoder for one picture at a time.

    Raises:
        ValueError: a value is not one of those offered, or two values contradict each other.
    """

    ignore: tuple[str, ...] = ()
    backend: str = FASTDIFF
    engines: str | Path | None = None
    ort_graphs: bool = False
    warm: str | Path | None = None
    tactics: bool = True
    vae_tiling: str = "auto"
    text_cache: int = 0
    offload_hoisted: bool = False
    parallel: str | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.ignore, list | tuple | set | frozenset) or not all(
            isinstance(name, str) for name in self.ignore
        ):
            raise UserError(
                f'Options.ignore is {self.ignore!r}; give a tuple of names, such as ("vae",)'
            )
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if self.backend not in BACKENDS:
            raise UserError(f"Options.backend is {self.backend!r}; choose {', '.join(BACKENDS)}")
        if not isinstance(self.engines, str | Path | None) or self.engines == "":
            raise UserError(
                f"Options.engines is {self.engines!r}; give the folder that fastdiff export wrote"
            )
        if not isinstance(self.ort_graphs, bool):
            raise UserError(f"Options.ort_graphs is {self.ort_graphs!r}; give True or False")
        if not isinstance(self.tactics, bool):
            raise UserError(f"Options.tactics is {self.tactics!r}; give True or False")
        if not isinstance(self.warm, str | Path | None) or self.warm == "":
            raise UserError(
                f"Options.warm is {self.warm!r}; give the folder that fastdiff warm wrote"
            )
        if self.vae_tiling not in TILINGS:
            raise UserError(
                f"Options.vae_tiling is {self.vae_tiling!r}; choose {', '.join(TILINGS)}"
            )
        if type(self.text_cache) is not int or self.text_cache < 0:
            raise UserError(
                f"Options.text_cache is {self.text_cache!r}; give the number of outputs to keep for"
                " each text encoder, such as 8"
            )
        if not isinstance(self.offload_hoisted, bool):
            raise UserError(
                f"Options.offload_hoisted is {self.offload_hoisted!r}; give True or False"
            )
        if self.offload_hoisted and self.backend != FASTDIFF:
            raise UserError(
                f'Options.offload_hoisted needs the backend "{FASTDIFF}"; got {self.backend!r}'
            )
        if self.parallel not in (None, *PARALLELS):
            raise UserError(
                f"Options.parallel is {self.parallel!r}; choose {', '.join(PARALLELS)} or None"
            )
        if not isinstance(self.batch_invariant, bool):
            raise UserError(
                f"Options.batch_invariant is {self.batch_invariant!r}; give True or False"
            )
        if self.batch_invariant and (self.backend != FASTDIFF or LOOP in self.ignore):
            raise UserError(
                f'Options.batch_invariant needs the backend "{FASTDIFF}" and its own loop; got'
                f" {self.backend!r}, ignore {self.ignore}"
            )
        if self.batch_invariant and self.parallel is not None:
            raise UserError("got Options.batch_invariant and Options.parallel; give one of them")
        if self.backend == FASTDIFF and self.engines is not None:
            raise UserError(
                f"Options.engines is {self.engines}; give the backend that runs it, too"
            )
        if self.ort_graphs and self.backend != "ort":
            raise UserError(f'Options.ort_graphs needs the backend "ort"; got {self.backend!r}')


class Keywords(TypedDict, total=False):
    """The fields of `Options`, as types for `compile`'s keywords."""

    ignore: tuple[str, ...]
    backend: str
    engines: str | Path | None
    ort_graphs: bool
    warm: str | Path | None
    tactics: bool
    vae_tiling: str
    text_cache: int
    offload_hoisted: bool
    parallel: str | None
    batch_invariant: bool


def chosen(options: Options | None, keywords: Mapping[str, Any]) -> Options:
    """The options that a caller gave as one object or as keywords; UserError for anything else."""
    names = ", ".join(field.name for field in fields(Options))
    if options is None:
        for name in keywords:
            if name not in names.split(", "):
                raise UserError(f"compile has no option {name!r}; its options are {names}")
        return Options(**keywords)
    if not isinstance(options, Options):
        raise UserError(
            f"compile's options are a {type(options).__name__}; give fastdiff.Options(...), or"
            f" keywords: {names}"
        )
    if keywords:
        raise UserError(f"compile was given options and the keyword {min(keywords)}; give one")
    return options
