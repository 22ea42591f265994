"""Writes exported networks as a model repository for NVIDIA Triton Inference Server."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastdiff import installed
from fastdiff.engines import exported, manifest
from fastdiff.errors import UserError

SCHEMA = "fastdiff.triton/1"
VERSION = "1"
MAX_BATCH = 4
"""The largest batch of an ONNX file, in one request or in requests that the server joins. Decoding
more pictures at once would fill a GPU's memory. An engine has its profile's limit."""
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
TYPES = {
    "float32": ("TYPE_FP32", 1),
    "float16": ("TYPE_FP16", 10),
    "bfloat16": ("TYPE_BF16", 16),
    "int64": ("TYPE_INT64", 7),
}
"""By torch dtype: Triton's name, and ONNX's number."""

Ports = dict[str, list[Any]]
"""Tensors by name: a torch dtype's name, then the sides; free sides have names."""


@dataclass(frozen=True)
class Model:
    """A network to serve.

    file: the network's file, in the exported folder.
    kind: where Triton places it: KIND_AUTO (a GPU if there is one) or KIND_GPU.
    max_batch: 0 if the server does not batch requests.
    """

    name: str
    file: str
    backend: str
    kind: str
    inputs: Ports
    outputs: Ports
    max_batch: int


def check_packages() -> None:
    """UserError unless Triton's own protobuf messages and onnx are installed."""
    try:
        import onnx  # noqa: F401
        from tritonclient.grpc import model_config_pb2  # noqa: F401
    except (ImportError, RuntimeError) as error:  # tritonclient raises RuntimeError without grpc
        raise UserError(
            f"--triton-repo needs tritonclient and onnx ({error});"
            f" {installed.pip('onnx', 'triton-server')}"
        ) from error


def is_exported(folder: Path) -> bool:
    """Whether `fastdiff export` wrote the folder, with --onnx or --trt."""
    return (folder / exported.FILE).is_file() or any(folder.rglob(manifest.FILE))


def read(folder: Path, target: str | None) -> tuple[Model, ...]:
    """The models of an exported folder, after every file's hash is checked.

    target: the engines' target, if there are several. UserError for any other folder, and for
    networks that Triton has no backend for.
    """
    if not (folder / exported.FILE).is_file():
        return _engines(folder, target)
    if target:
        raise UserError(f"--target chooses engines, but {folder} holds ONNX files; leave it out")
    try:
        return models(exported.check(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / exported.FILE} is damaged; export again") from error


def models(document: dict[str, Any]) -> tuple[Model, ...]:
    """The models in an export's document, schema `fastdiff.export/1`."""
    return tuple(_onnx(row) for row in document["parts"])


def config(model: Model) -> str:
    """The model's config.pbtxt, a protobuf message ModelConfig of Triton.

    Triton has no tensors without sides: a scalar is declared as [1], which its ONNX Runtime backend
    (from release 23.10 on) passes on as a scalar. Without a batch it refuses to reshape to [].
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    message = model_config_pb2.ModelConfig(
        name=model.name,
        platform=PLATFORMS[model.backend],
        backend=model.backend,
        max_batch_size=model.max_batch,
    )
    skipped = 1 if model.max_batch else 0  # Triton adds the batch to `dims` itself
    for ports, made in ((model.inputs, message.input), (model.outputs, message.output)):
        for name, (dtype, *shape) in ports.items():
            dims = _sides(shape)[skipped:] or [1]
            made.add(name=name, data_type=TYPES[dtype][0], dims=dims)
    if model.max_batch > 1:
        message.dynamic_batching.SetInParent()
    message.instance_group.add(count=1, kind=model.kind)
    text: str = text_format.MessageToString(message, use_short_repeated_primitives=True)
    return text


def check(text: str, file: Path) -> None:
    """UserError unless a config.pbtxt, read back, declares exactly the ONNX file's tensors."""
    import onnx
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    message = text_format.Parse(text, model_config_pb2.ModelConfig())
    names = {number: name for name, number in TYPES.values()}
    batch = [-1] if message.max_batch_size else []
    graph = onnx.load(file, load_external_data=False).graph
    for told, values in ((message.input, graph.input), (message.output, graph.output)):
        asked = {
            port.name: (model_config_pb2.DataType.Name(port.data_type), [*batch, *port.dims])
            for port in told
        }
        found = {}
        for value in values:
            tensor = value.type.tensor_type
            sides = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            found[value.name] = names.get(tensor.elem_type, "another type"), sides or [1]
        for name in asked.keys() | found.keys():
            if asked.get(name) != found.get(name):
                raise UserError(
                    f"{file} has {_tensor(name, found.get(name))}, its export.json "
                    f"{_tensor(name, asked.get(name))}; export again"
                )


def fill(
    place: Path, source: Path, found: tuple[Model, ...], put: Callable[[Path, Path], object]
) -> None:
    """Write the repository of `found` into the empty folder `place`; `put` copies a file of
    `source`.

    `put` must not make hard links: onnx refuses to read a weights file that has a second name.
    UserError if a file's tensors differ from its description.
    """
    for model in found:
        file = source / model.file
        text = config(model)
        if model.backend == "onnxruntime":
            check(text, file)
        version = place / model.name / VERSION
        version.mkdir(parents=True)
        for path in exported.files_of(file):
            put(path, version / path.name)
        (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")


def document(found: tuple[Model, ...]) -> dict[str, Any]:
    """Schema `fastdiff.triton/1`: each model's backend, largest batch and tensors."""
    rows = [
        {
            "name": model.name,
            "backend": model.backend,
            "max_batch_size": model.max_batch,
            "inputs": model.inputs,
            "outputs": model.outputs,
        }
        for model in found
    ]
    return {"schema": SCHEMA, "models": rows}


def _onnx(row: dict[str, Any]) -> Model:
    name, file = PurePosixPath(row["file"]).parts
    if name in ("..", "/") or file != "model.onnx":
        raise ValueError(row["file"])
    tensors = row["inputs"] | row["outputs"]
    if "bfloat16" in {dtype for dtype, *_ in tensors.values()}:
        raise UserError(
            f"{name} has bfloat16 tensors, which Triton's ONNX Runtime backend does not take; "
            "export with --dtype fp16 or fp32"
        )
    return Model(
        name=name,
        file=row["file"],
        backend="onnxruntime",
        kind="KIND_GPU" if row.get("contrib_ops") else "KIND_AUTO",
        inputs=row["inputs"],
        outputs=row["outputs"],
        max_batch=MAX_BATCH if _begins_free(tensors) else 0,
    )


def _engines(folder: Path, target: str | None) -> tuple[Model, ...]:
    """The models of the folder's engines for `target`, or for the only target."""
    read = {place: manifest.read(place) for place in manifest.find(folder)}
    targets = sorted({made.target for made in read.values()})
    if target is None and len(targets) > 1:
        raise UserError(f"{folder} has engines for {', '.join(targets)}; choose one with --target")
    chosen = {place: made for place, made in read.items() if target in (None, made.target)}
    if not chosen:
        raise UserError(f"{folder} has no engines for {target}, only for {', '.join(targets)}")
    return tuple(_engine(folder, place) for place in chosen)


def _engine(folder: Path, place: Path) -> Model:
    made = manifest.check(place)
    if made.flavor != "tensorrt":
        raise UserError(
            f"{place} was built by TensorRT-RTX, for which Triton has no backend; export with "
            "--flavor tensorrt, or use the folder written by --onnx"
        )
    tensors = made.inputs | made.outputs
    for name, (_, *shape) in tensors.items():
        if not shape:
            raise UserError(
                f"{place} takes {name} without sides, which Triton's TensorRT backend cannot "
                "pass; use the folder written by --onnx"
            )
    bounds = [shapes for profile in made.profiles for shapes in profile.values()]
    least = max((shape["min"][0] for shape in bounds), default=0)
    most = min((shape["max"][0] for shape in bounds), default=0)
    return Model(
        name=made.part,
        file=(place / manifest.PLAN).relative_to(folder).as_posix(),
        backend="tensorrt",
        kind="KIND_GPU",
        inputs=made.inputs,
        outputs=made.outputs,
        max_batch=most if least == 1 and _begins_free(tensors) else 0,
    )


def _begins_free(tensors: Ports) -> bool:
    """Whether every tensor begins with the same free side, and has other sides."""
    shapes = [shape for _, *shape in tensors.values()]
    first = shapes[0][:1]
    return all(len(s) > 1 and s[:1] == first and isinstance(s[0], str) for s in shapes)


def _sides(shape: list[Any]) -> list[int]:
    """The shape with -1 for its free sides."""
    return [side if isinstance(side, int) else -1 for side in shape]


def _tensor(name: str, what: tuple[str, list[int]] | None) -> str:
    return f"{name} {what[0]} {what[1]}" if what else f"no {name}"
