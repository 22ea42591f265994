"""The parity report: its budget is recomputed by hand, and it names the node of every planted
fault."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command import run
from diffusers import UNet2DConditionModel
from onnx import helper, numpy_helper
from onnxscript import ir
from small import ONE_LEVEL, noisy

from fastdiff.engines.ort import Session
from fastdiff.errors import UserError
from fastdiff.export import bisect, parity, picture
from fastdiff.export import onnx as exporter
from fastdiff.export import parts as parts_module
from fastdiff.export.parts import parts

SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Exported:
    part: Any
    program: Any
    file: Path
    inputs: dict

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.file)

    def find(self, model, program=None):
        file = self.file.with_name("planted.onnx")
        onnx.save(model, file)
        return bisect.find(self.part, file, self.inputs, program or self.program)


@pytest.fixture(scope="module")
def small(small_demo):
    """A pipeline with the smallest U-Net, which is quick to export and has all kinds of layers."""
    pipe = copy.copy(small_demo)
    pipe.unet = noisy(UNet2DConditionModel(**ONE_LEVEL))
    return pipe


@pytest.fixture(scope="module", params=["text_encoder", "unet", "vae_decoder"])
def exported(request, small, tmp_path_factory):
    (part,) = (part for part in parts(small, torch.float32) if part.folder == request.param)
    program = exporter.to_program(part, 20)
    file = tmp_path_factory.mktemp("parity") / "model.onnx"
    ir.save(program.model, file)
    inputs = list(parity.cases(part))[-1][1]
    return Exported(part, program, file, inputs)


def constants(model):
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims
    }


def change(model, node, slot, function):
    """Replace the constant that is a node's input number `slot`, for this node only."""
    value = function(constants(model)[node.input[slot]]).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(value, "planted"))
    node.input[slot] = "planted"


def weight(model, node):
    change(model, node, 1, lambda value: value * 1.001)


def bias(model, node):
    change(model, node, len(node.input) - 1, lambda value: value + 1e-3)


def epsilon(model, node):
    (attribute,) = (a for a in node.attribute if a.name == "epsilon")
    attribute.f *= 30


def activation(model, node):
    if node.op_type == "Gelu":
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("approximate", "tanh"))
    else:
        node.op_type = "HardSigmoid"


def precision(model, node):
    """Cast the node's inputs to bfloat16 and back; ONNX Runtime removes such casts to float16."""
    position = list(model.graph.node).index(node)
    casts = []
    for slot, name in enumerate(node.input):
        half, back = f"planted.{slot}.half", f"planted.{slot}"
        casts.append(helper.make_node("Cast", [name], [half], to=onnx.TensorProto.BFLOAT16))
        casts.append(helper.make_node("Cast", [half], [back], to=onnx.TensorProto.FLOAT))
        node.input[slot] = back
    for cast in reversed(casts):
        model.graph.node.insert(position, cast)


PLANTED = {  # a fault, and the operators that it is planted in
    weight: ("Conv", "MatMul", "Gemm"),
    bias: ("Conv", "Gemm", "Add"),
    epsilon: ("LayerNormalization", "InstanceNormalization"),
    activation: ("Sigmoid", "Gelu"),
    precision: ("Conv", "MatMul", "Gemm", "Softmax"),
}


def candidates(model, plant, operators):
    """Indices of the nodes that a fault can be planted in."""
    known = constants(model)
    found = []
    for index, node in enumerate(model.graph.node):
        slot = {weight: 1, bias: len(node.input) - 1}.get(plant)
        if node.op_type not in operators or (slot and node.input[slot] not in known):
            continue
        if not (plant is bias and node.op_type == "Conv" and len(node.input) < 3):
            found.append(index)
    return found


def module_of(node):
    """The path of torch's module, which its exporter writes into the node's metadata."""
    (scopes,) = (entry.value for entry in node.metadata_props if entry.key == SCOPES)
    return json.loads(scopes.replace("'", '"'))[-2].removeprefix("net.")


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(slice(1), id="one"),
        pytest.param(slice(1, 4), id="three more", marks=pytest.mark.product),
    ],
)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_the_planted_node_is_named(exported, plant, chosen):
    found = candidates(exported.model, plant, PLANTED[plant])
    for index in np.random.default_rng(7).choice(found, 4)[chosen]:  # random nodes at any depth
        model = exported.model
        node = model.graph.node[index]
        kind = node.op_type
        plant(model, node)
        fault = exported.find(model)
        assert fault is not None, node.name
        assert (fault.node, fault.value) == (node.name, node.output[0]), fault
        assert fault.expected_op == kind
        assert fault.made_by[-1] == node.op_type
        assert fault.made_by.count("Cast") == (2 * len(node.input) if plant is precision else 0)
        assert fault.module == module_of(node)
        assert not fault.together
        assert fault.error > fault.allowed
        for part in (fault.node, fault.module, fault.torch_op, f"{fault.got:.7g}"):
            assert part in str(fault)


def test_a_wrong_shape_is_reported_as_a_wrong_shape(exported):
    """The last node's output is transposed, which ONNX Runtime computes without an error."""
    model = exported.model
    output = exported.part.outputs[0].name
    (last,) = (node for node in model.graph.node if output in node.output)
    last.output[list(last.output).index(output)] = "straight"
    (value,) = (value for value in model.graph.output if value.name == output)
    sides = list(range(len(value.type.tensor_type.shape.dim)))
    swapped = [*sides[:-2], sides[-1], sides[-2]]
    model.graph.node.append(helper.make_node("Transpose", ["straight"], [output], perm=swapped))
    for dim in value.type.tensor_type.shape.dim:
        dim.Clear()
    fault = exported.find(model)
    assert (fault.node, fault.value) == (last.name, output)
    assert fault.made_by[-1] == "Transpose"
    shape = list(fault.expected_shape)
    swapped = [*shape[:-2], shape[-1], shape[-2]]
    assert list(fault.got_shape) == swapped != shape
    assert str(fault).endswith(f"has the shape {swapped}, expected {shape}")


@pytest.mark.parametrize("exported", ["unet"], indirect=True)
def test_a_node_that_many_operations_share_is_one_fault(exported):
    """The activation of the time embedding: torch computes it in every block, the file once."""
    model = exported.model
    healthy = exported.find(model)  # on some CPUs a correct product exceeds its budget
    beyond = 0 if healthy is None else 1 + healthy.others
    readers = [name for node in model.graph.node for name in node.input]
    shared = max(
        (node for node in model.graph.node if "aten.silu" in str(node.metadata_props)),
        key=lambda node: readers.count(node.output[0]) if node.op_type == "Mul" else 0,
    )
    assert readers.count(shared.output[0]) >= 5
    (node,) = (node for node in model.graph.node if node.output[0] == shared.input[1])
    activation(model, node)
    fault = exported.find(model)
    assert fault.node == node.name
    assert fault.others == beyond


@pytest.mark.parametrize("exported", ["unet"], indirect=True)
def test_a_concatenation_in_the_wrong_order_is_named(exported):
    model = exported.model
    shapes = {v.name: v.type.tensor_type.shape for v in model.graph.value_info}
    node = next(
        node
        for node in model.graph.node
        if node.op_type == "Concat" and all(len(shapes[name].dim) == 4 for name in node.input)
    )
    node.input.extend([node.input[1], node.input[0]])
    del node.input[:2]
    fault = exported.find(model)
    assert (fault.node, fault.torch_op) == (node.name, "aten.cat.default")


def test_expected_is_what_torch_computes(exported):
    """The value at a planted convolution or projection, from a hook on torch's float64 module."""
    model = exported.model
    index = candidates(model, weight, ("Conv", "MatMul"))[-1]
    weight(model, model.graph.node[index])
    fault = exported.find(model)
    seen = []
    net = copy.deepcopy(exported.part.module).double()
    net.net.get_submodule(fault.module).register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        net(*(v.double() if v.is_floating_point() else v for v in exported.inputs.values()))
    expected = float(seen[0][fault.index])
    if fault.expected_op == "MatMul":  # the bias is added by another node
        expected -= float(net.net.get_submodule(fault.module).bias.detach()[fault.index[-1]])
    assert fault.expected == pytest.approx(expected, rel=1e-4)
    assert fault.got == pytest.approx(1.001 * expected, rel=1e-4)


def test_a_wrong_translation_is_distinguished_from_a_wrong_node(exported):
    """The exporter's own nodes are wrong, so no node of the file differs from them."""
    model = exported.model
    node = next(node for node in model.graph.node if node.op_type in ("Sigmoid", "Gelu"))
    activation(model, node)
    fault = exported.find(
        model,
        SimpleNamespace(
            model=ir.from_proto(model), exported_program=exported.program.exported_program
        ),
    )
    assert fault.module == module_of(node)
    alone = exported.part.folder == "text_encoder"  # where x sigmoid(1.7 x) is three operations
    assert fault.together is not alone
    assert "with the nodes before it" in str(fault) or alone


def test_no_node_is_named_where_nothing_is_wrong(exported):
    """Or, at most, a node that rounds a little more than torch and exceeds its budget less than
    twice."""
    fault = exported.find(exported.model)
    assert fault is None or fault.error <= 2 * fault.allowed
    names = {path.name for path in exported.file.parent.iterdir()}
    assert names == {"model.onnx", "planted.onnx"}


def test_budget_is_twice_eagers_error_and_one_rounding(exported):
    """Eager's error is that on one thread, in the worse of torch's memory formats."""
    part, threads = exported.part, torch.get_num_threads()
    session = Session(exported.file, torch.device("cpu"))
    torch.set_num_threads(2)
    rows = parity.verify_part(part, session)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    rows = {(row.case, row.output): row for row in rows}
    assert all(row.passed for row in rows.values())
    exact_net = copy.deepcopy(part.module).double()
    nhwc = copy.deepcopy(part.module).to(memory_format=torch.channels_last)
    compared = 0
    with torch.no_grad():
        for case, inputs in parity.cases(part):
            given = list(inputs.values())
            exact = exact_net(*(v.double() if v.is_floating_point() else v for v in given))
            for port, got, eager, other, truth in zip(
                *(part.outputs, session(inputs), part.module(*given), nhwc(*given), exact),
                strict=True,
            ):
                row = rows[case, port.name]
                errors = [float((value - truth).abs().max()) for value in (got, eager, other)]
                largest = float(truth.abs().max())
                budget = 2 * (max(errors[1:]) + 2**-23 * largest)
                assert row.max_abs == pytest.approx(errors[0], rel=1e-9)
                assert row.allowed == pytest.approx(budget, rel=1e-9)
                assert row.relative == pytest.approx(errors[0] / largest, rel=1e-9, abs=1e-12)
                wave = np.dot(got.double().flatten(), truth.flatten())
                length = float(got.double().norm() * truth.norm())
                assert row.cosine == pytest.approx(wave / length, rel=1e-12)
                compared += 1
    assert compared == len(rows)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e-3])
def test_any_runtime_can_be_verified(small, wrong):
    """A runtime is a callable from inputs to outputs: torch itself passes, and fails if one element
    is wrong."""
    part = parts(small, torch.float32)[0]

    def run(inputs):
        with torch.no_grad():
            return part.module(*inputs.values())

    def broken(inputs):
        outputs = run(inputs)
        outputs[1][0, 0] += wrong
        return outputs

    assert all(row.passed for row in parity.verify_part(part, run))
    rows = parity.verify_part(part, broken)
    assert {row.output for row in rows if not row.passed} == {"pooler_output"}
    report = parity.to_dict(
        parity.Parity(tuple(rows), float("-inf"), faults={"text_encoder": None})
    )
    assert json.dumps(report, allow_nan=False)
    assert (report["psnr_db"], report["passed"]) == (None, False)
    text = parity.to_markdown(
        parity.Parity(tuple(rows), float("-inf"), faults={"text_encoder": None})
    )
    assert "**FAILED**" in text
    assert "text_encoder departs from torch at no single operation" in text


def test_pictures_are_compared_before_a_safety_checker_blackens_both(demo):
    pipe = copy.copy(demo)

    def blacken(images, **_):
        return torch.zeros_like(images), [True] * len(images)

    pipe.register_modules(
        safety_checker=blacken, feature_extractor=lambda *_, **__: SimpleNamespace(to=lambda *_: {})
    )
    networks = parts(pipe, torch.float32)
    modules = {part.folder: copy.deepcopy(part.module) for part in networks}
    runs = {name: lambda inputs, net=net: net(*inputs.values()) for name, net in modules.items()}
    decode = runs["vae_decoder"]
    with torch.no_grad():
        runs["vae_decoder"] = lambda inputs: (-decode(inputs)[0],)
        assert picture.psnr(pipe, networks, runs) < 20
    assert pipe.safety_checker is blacken


def test_an_output_of_another_shape_fails(small):
    """Also one that could be broadcast to the right shape."""
    part = parts(small, torch.float32)[0]

    def first(inputs):
        with torch.no_grad():
            return tuple(output[:1] for output in part.module(*inputs.values()))

    rows = parity.verify_part(part, first)
    single = {case for case, inputs in parity.cases(part) if len(inputs["input_ids"]) == 1}
    assert {row.case for row in rows if row.passed} == single != set()


def test_nothing_is_proven_where_torch_overflows():
    numbers = {"max_abs": 1.0, "torch_max_abs": float("inf"), "allowed": float("inf")}
    row = parity.Row("unet", "out_sample", "1×8×8", **numbers, relative=1.0, cosine=0.5)
    assert not row.passed


def test_shapes_that_a_file_does_not_take_are_an_error_of_one_sentence(exported):
    session = Session(exported.file, torch.device("cpu"))
    name = exported.part.inputs[0].name
    wrong = dict(exported.inputs) | {name: exported.inputs[name][..., None]}
    with pytest.raises(UserError, match=rf"cannot run .*model.onnx on {name} \[.*1\]"):
        session(wrong)


def test_export_that_draws_something_else_exits_1_and_names_the_node(tmp_path, monkeypatch):
    """The whole command on the text encoder, whose file is changed before it is verified."""
    write, planted = exporter.write, []

    def spoil(part, folder, *rest):
        written = write(part, folder, *rest)
        model = onnx.load(folder / part.file)
        node = model.graph.node[candidates(model, weight, ("MatMul",))[2]]
        weight(model, node)
        onnx.save(model, folder / part.file)
        planted.append((node.name, module_of(node)))
        return written

    monkeypatch.setattr(exporter, "write", spoil)
    monkeypatch.setattr(parts_module, "parts", lambda *of, **how: parts(*of, **how)[:1])
    code, out, err = run("export", "--onnx", "--out", tmp_path / "out", "--verify")
    ((node, module),) = planted
    assert code == 1
    assert f"text_encoder departs from torch at MatMul {node}" in out
    assert "out of budget, searching for the node" in err
    report = json.loads((tmp_path / "out/parity.json").read_text())
    assert report["schema"] == "fastdiff.parity/1"
    assert not report["passed"]
    fault = report["faults"]["text_encoder"]
    assert (fault["node"], fault["module"]) == (node, module)
    assert node in (tmp_path / "out/parity.md").read_text()


def test_psnr_is_that_of_the_drawn_picture(demo):
    """With torch's own modules it is infinite; with a decoder that draws grey it is that of the
    grey picture."""
    networks = parts(copy.deepcopy(demo), torch.float32)

    def torchs(part):
        return lambda inputs: part.module(*inputs.values())

    runs = {part.folder: torchs(part) for part in networks}
    attributes = [set(vars(net)) for net in (demo.unet, demo.vae, demo.text_encoder)]
    with torch.no_grad():
        assert picture.psnr(demo, networks, runs) == float("inf")
        runs["vae_decoder"] = lambda inputs: (torch.full((1, 3, 64, 64), 0.5),)
        got = picture.psnr(demo, networks, runs)
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    drawn = demo("red heart", num_inference_steps=4, **options).images
    assert got == pytest.approx(-10 * np.log10(np.square(drawn - 0.75).mean()), abs=1e-3)
    assert [set(vars(net)) for net in (demo.unet, demo.vae, demo.text_encoder)] == attributes


def test_an_engine_with_bound_memory_computes_what_its_file_does(small_demo, small_onnx):
    """GPU engines are verified so: on memory whose shapes follow from the ports."""
    for part in parts(small_demo, torch.float32):
        session = Session(small_onnx / part.file, torch.device("cpu"))
        run_bound = picture.run_of(session, part)
        for _, inputs in parity.cases(part):
            for bound, free in zip(run_bound(inputs), session(inputs), strict=True):
                assert torch.equal(bound, free)
