"""Finds where a file departs from torch: each operation is judged on the inputs it received.

Errors are not carried along: torch's operation, in float64 and with torch's weights, gets the
runtime's own inputs. So two runs of the file find the node at any depth. The first compares each of
torch's operations with its error budget; the second, each node of the operation that exceeds its
budget most.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor, fx

from fastdiff.engines.ort import Session
from fastdiff.export.fault import Fault
from fastdiff.export.parts import Part
from fastdiff.kernels.contract import Verdict, judge, max_error

Get = Callable[[str], Any]


@dataclass(frozen=True)
class _Op:
    """An operation of torch or a node of ONNX: run(get, exact) returns its `outputs`."""

    outputs: tuple[str, ...]
    run: Callable[[Get, bool], Iterable[Any]]
    source: Any


@dataclass(frozen=True)
class _Judged:
    op: _Op
    verdict: Verdict
    got: Tensor
    exact: Tensor

    @property
    def strain(self) -> float:
        error, allowed = self.verdict.error, self.verdict.allowed
        return error / allowed if allowed else float("inf") if error else 0.0


@torch.no_grad()
def find(part: Part, file: Path, inputs: Mapping[str, Tensor], program: Any) -> Fault | None:
    """The node of `file` that computes something else than torch, or less exactly.

    None if every operation is within its budget. Then many small errors add up, or they come from
    ONNX Runtime's fusions, which do not happen if intermediate values are requested.

    Args:
        part: the source of the file.
        inputs: the part's, by name, on the CPU; the smallest inputs that fail are quickest.
        program: a fresh result of `onnx.to_program`; the file's nodes should equal its nodes.
    """
    exported, nodes = program.exported_program, list(program.model.graph)
    signature = exported.graph_signature
    names = dict(zip(signature.user_outputs, (port.name for port in part.outputs), strict=True))
    made = {value.name for node in nodes for value in node.outputs}
    ops = [_torch_op(node, names) for node in _distinct(exported.graph.nodes, names, made)]
    tensors = [op.outputs[0] for op in ops if isinstance(op.source.meta.get("val"), Tensor)]
    seen = _run(file, [name for name in tensors if name in made], inputs)
    known = dict(zip(signature.user_inputs, inputs.values(), strict=True))
    weights = {**exported.state_dict, **exported.constants}
    known |= {spec.arg.name: weights[spec.target] for spec in signature.input_specs if spec.target}
    worst, others = _worst(_judge(ops, known, seen))
    if worst is None:
        return None
    name = worst.op.outputs[0]
    between = _between(nodes, name, {*seen, *inputs} - {name})
    version = program.model.opset_imports[""]
    blamed = _blame(file, worst, [_onnx_op(node, version) for node in between], inputs)
    return _in_file(file, worst, blamed, between[-1], others)


def opset(file: Path) -> int:
    """The opset of an ONNX file."""
    import onnx

    imports = onnx.load(str(file), load_external_data=False).opset_import
    return next(int(entry.version) for entry in imports if entry.domain == "")


def _blame(
    file: Path, worst: _Judged, ops: list[_Op], inputs: Mapping[str, Tensor]
) -> _Judged | None:
    """The node over budget among those that make up one operation of torch."""
    if len(ops) == 1:
        return replace(worst, op=ops[0])
    values = [v for op in ops for v in (*op.source.inputs, *op.source.outputs) if v is not None]
    seen = _run(file, [value.name for value in values], inputs) | dict(inputs)
    constants = {
        value.name: torch.from_numpy(value.const_value.numpy().copy())
        for value in values
        if value.const_value is not None
    }
    return _worst(_judge(ops, constants, seen))[0]


def _in_file(file: Path, worst: _Judged, blamed: _Judged | None, last: Any, others: int) -> Fault:
    import onnx

    judged = blamed or worst
    node = blamed.op.source if blamed else last
    value = judged.verdict.output
    source: Any = worst.op.source
    modules = [path for path, _ in source.meta.get("nn_module_stack", {}).values()]
    index, got, expected = _furthest(judged.got, judged.exact)
    graph = onnx.load(str(file), load_external_data=False).graph
    return Fault(
        node=node.name,
        value=value,
        made_by=_made_by(graph, value, {i.name for i in node.inputs if i is not None}),
        expected_op=node.op_type,
        torch_op=str(source.target),
        module=modules[-1].removeprefix("net.") if modules else "the network itself",
        together=blamed is None,
        error=judged.verdict.error,
        allowed=judged.verdict.allowed,
        got=got,
        expected=expected,
        index=index,
        got_shape=tuple(judged.got.shape),
        expected_shape=tuple(judged.exact.shape),
        others=others,
    )


def _furthest(got: Tensor, exact: Tensor) -> tuple[tuple[int, ...], float, float]:
    if got.shape != exact.shape:
        return (), float("nan"), float("nan")
    largest = (got.double() - exact.double()).abs().nan_to_num(torch.inf).argmax()
    index = tuple(int(i) for i in torch.unravel_index(largest, got.shape))
    return index, float(got[index]), float(exact[index])


def _distinct(
    nodes: Iterable[fx.Node], names: dict[str, str], made: Collection[str]
) -> list[fx.Node]:
    """torch's operations without repeats, which the exporter merges under the first's name."""
    first: dict[str, str] = {}
    found = []
    for node in nodes:
        if node.op != "call_function":
            continue
        given = fx.node.map_arg((node.args, node.kwargs), lambda n: names.get(n.name, n.name))
        own = names.get(node.name, node.name)
        same = first.setdefault(f"{node.target}{given}", own)
        if same != own and own not in made:
            names[node.name] = same
        else:
            found.append(node)
    return found


def _torch_op(node: fx.Node, names: Mapping[str, str]) -> _Op:
    """`names`: of values that have another name in the file."""

    def run(get: Get, exact: bool) -> Iterable[Any]:
        def given(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return get(names.get(value.name, value.name))
            if exact and isinstance(value, torch.dtype) and value.is_floating_point:
                return torch.float64  # a cast within the graph
            return value

        arguments: Any = fx.node.map_aggregate((node.args, node.kwargs), given)
        target: Any = node.target
        return (target(*arguments[0], **arguments[1]),)

    return _Op((names.get(node.name, node.name),), run, node)


def _onnx_op(node: Any, opset: int) -> _Op:
    """An onnx_ir Node, computed by ONNX's reference implementation."""
    from onnx import ValueInfoProto, helper
    from onnx.reference import ReferenceEvaluator
    from onnxscript import ir

    proto = ir.to_proto(node)
    takes = [name for name in proto.input if name]
    given, made = ([ValueInfoProto(name=name) for name in side] for side in (takes, proto.output))
    evaluator = ReferenceEvaluator(helper.make_graph([proto], "node", given, made), {"": opset})

    def run(get: Get, exact: bool) -> Iterable[Any]:
        values = evaluator.run(None, {name: get(name).numpy() for name in takes})
        return [torch.as_tensor(value) for value in values]

    return _Op(tuple(proto.output), run, node)


def _judge(
    ops: Iterable[_Op], known: Mapping[str, Tensor], seen: Mapping[str, Tensor]
) -> Iterator[_Judged]:
    """Run `ops` on `known` values, in float64 and in the file's dtype, and judge the outputs
    `seen`.

    Later operations get the seen value of each input, or if there is none, the value just computed.
    """
    computed: tuple[dict[str, Any], dict[str, Any]] = {}, {}

    def get(exact: bool) -> Get:
        def value(name: str) -> Any:
            if name in computed[exact]:
                return computed[exact][name]
            found = seen[name] if name in seen else known[name]
            return found.double() if exact and found.is_floating_point() else found

        return value

    for op in ops:
        both = (op.run(get(exact), exact) for exact in (False, True))
        for name, eager, exact in zip(op.outputs, *both, strict=True):
            if name in seen:
                yield _Judged(op, _verdict(name, seen[name], eager, exact), seen[name], exact)
            if name not in seen or seen[name].shape != exact.shape:
                computed[False][name], computed[True][name] = eager, exact


def _verdict(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> Verdict:
    if got.shape != exact.shape:
        return Verdict(name, float("inf"), 0.0)
    if not got.is_floating_point():
        return Verdict(name, max_error(got, exact), 0.0)
    return judge(name, got, eager, exact)


def _worst(judged: Iterable[_Judged]) -> tuple[_Judged | None, int]:
    """The first of those that exceed their budget most, and the number of others that exceed it."""
    worst, count = None, 0
    for one in judged:
        if not one.verdict.passed:
            count += 1
            if worst is None or one.strain > worst.strain:
                worst = one
    return worst, max(count - 1, 0)


def _between(nodes: list[Any], value: str, known: Collection[str]) -> list[Any]:
    """The nodes that lead from `known` values and constants to `value`, in order."""
    wanted, found = {value}, []
    for node in reversed(nodes):
        if any(output.name in wanted for output in node.outputs):
            found.append(node)
            wanted |= {i.name for i in node.inputs if i is not None and i.name not in known}
    return found[::-1]


def _made_by(graph: Any, value: str, inputs: Collection[str]) -> tuple[str, ...]:
    """The operators in a file that lead from `inputs` to `value`, in order."""
    wanted, found = {value}, []
    for node in reversed(graph.node):
        if not wanted.isdisjoint(node.output):
            found.append(node.op_type)
            wanted |= set(node.input) - set(inputs)
    return tuple(reversed(found))


def _run(file: Path, values: Iterable[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The requested `values`, if the file has them, and its outputs, by name."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    known = {output.name for output in model.graph.output}
    made = {name for node in model.graph.node for name in node.output} - known
    wanted = dict.fromkeys(name for name in values if name in made)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    # in the file's folder, so that its weights are found
    with NamedTemporaryFile(dir=file.parent, prefix=".", suffix=".onnx") as probe:
        probe.write(model.SerializeToString())
        probe.flush()
        session = Session(Path(probe.name), torch.device("cpu"))
    return dict(zip(session.outputs, session(inputs), strict=True))
