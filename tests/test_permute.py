"""Free permutations: every group that is found may take any order, everything else is pinned and says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from channels import STEPS, Builder, random_net, text, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vqonnx.errors import OptionError
from vqonnx.generate import generate_feeds
from vqonnx.modelfile import load, save
from vqonnx.permute import Group, Groups, apply, find_groups
from vqonnx.permute.atoms import Atom, Piece, cut, join, length, pin, resolve
from vqonnx.permute.reader import carried
from vqonnx.runtime import open_session, run

HERE = Path()


def outputs(model: ModelProto, feed: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    return list(run(open_session(model.SerializeToString()), feed).values())


def copy_of(model: ModelProto) -> ModelProto:
    twin = ModelProto()
    twin.CopyFrom(model)
    return twin


def shuffled(model: ModelProto, groups: tuple[Group, ...], seed: int, folder: Path = HERE) -> ModelProto:
    twin, rng = copy_of(model), np.random.default_rng(seed)
    for group in groups:
        apply(twin, group, rng.permutation(group.size), folder)
    return twin


def assert_free(model: ModelProto, found: Groups, seed: int = 0) -> None:
    """Outputs are the same to the last bit, with one group permuted and with all of them."""
    feed = {"x": whole(np.random.default_rng(seed), 2, 3, 4, 4)}
    expected = outputs(model, feed)
    assert np.abs(expected[0]).max() < 2**24, "sums are exact"
    for groups in ((group,) for group in found.groups):
        for before, after in zip(expected, outputs(shuffled(model, groups, seed), feed), strict=True):
            np.testing.assert_array_equal(before, after, err_msg=str(groups))
    for before, after in zip(expected, outputs(shuffled(model, found.groups, seed), feed), strict=True):
        np.testing.assert_array_equal(before, after)


# Laws


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**16), steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=7))
def test_every_group_that_is_found_is_free(seed: int, steps: list[str]) -> None:
    model = random_net(seed, steps)
    found = find_groups(model, HERE)
    assert any(group.producers and group.consumers for group in found.groups), "the last hidden layer at least"
    expected = outputs(model, {"x": whole(np.random.default_rng(seed), 2, 3, 4, 4)})
    if np.abs(expected[0]).max() < 2**24:
        assert_free(model, found, seed)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=7))
def test_a_permutation_and_its_inverse_give_the_same_bytes(seed: int, steps: list[str]) -> None:
    model = random_net(seed, steps)
    rng = np.random.default_rng(seed)
    twin = copy_of(model)
    for group in find_groups(model, HERE).groups:
        order = rng.permutation(group.size)
        apply(twin, group, order, HERE)
        apply(twin, group, np.argsort(order), HERE)
    assert twin.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


@given(st.data())
def test_atoms_keep_lengths_and_equal_places(data: st.DataObject) -> None:
    """What is joined is equal place by place, however axes are cut and put together again."""
    atoms = [Piece(Atom(size)) for size in data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))]
    total = length(atoms)
    axis = list(atoms)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, total))
        head, tail = cut(axis, 0, at), cut(axis, at, total)
        assert head is not None
        assert tail is not None
        turned = [*tail, *head]
        assert length(turned) == total
        assert join(axis, turned)
        places = [[(id(p.atom), n) for p in resolve(side) for n in range(p.atom.size)] for side in (axis, turned)]
        assert places[0] == places[1]
        axis = data.draw(st.sampled_from([axis, turned]))
    pin(axis[:1], "here")
    assert resolve(axis)[0].atom.pinned == "here"


@given(data=st.data())
def test_carried_is_what_numpy_does(data: st.DataObject) -> None:
    """Channels that are carried through a reshape are found where it says."""
    before = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    axis = data.draw(st.integers(0, len(before) - 1))
    total = int(np.prod(before))
    sizes: list[int] = []
    left = total
    while left > 1:
        size = data.draw(st.sampled_from([n for n in range(2, left + 1) if left % n == 0]))
        sizes.append(size)
        left //= size
    after = tuple(sizes)
    moved = carried(before, axis, (Piece(Atom(before[axis])),), after)
    if moved is None:
        return
    order = np.random.default_rng(0).permutation(before[axis])
    values = np.arange(total).reshape(before)
    place, (piece,) = moved
    index = (order[:, None] * piece.run + np.arange(piece.run)).ravel()
    expected = values.reshape(after).take(index, axis=place)
    np.testing.assert_array_equal(values.take(order, axis=axis).reshape(after), expected)


# What is found


def sizes(found: Groups) -> list[int]:
    return [group.size for group in found.groups]


def test_a_chain_has_a_group_for_each_hidden_layer() -> None:
    model = text(
        "a = Conv (x, w1, b1)  b = Relu (a)  c = Conv (b, w2)  y = Conv (c, w3)",
        w1=(6, 3, 1, 1), b1=(6,), w2=(4, 6, 1, 1), w3=(2, 4, 1, 1),
    )  # fmt: skip
    found = find_groups(model, HERE)
    assert sizes(found) == [6, 4]
    first = found.groups[0]
    assert [(part.name, part.axis) for part in first.producers] == [("w1", 0)]
    assert [(part.name, part.axis) for part in first.consumers] == [("w2", 1)]
    assert {(part.name, part.axis) for part in first.constants} == {("w1", 0), ("b1", 0), ("w2", 1)}
    reasons = [pinned.reason for pinned in found.pinned]
    assert reasons == ["'x' is an input of the graph", "'y' is an output of the graph"]
    assert_free(model, found)


def test_a_residual_stream_is_one_group() -> None:
    model = text(
        "a = Conv (x, w1)  b = Conv (a, w2)  c = Add (a, b)  d = Conv (c, w3)  e = Add (c, d)  y = Conv (e, w4)",
        w1=(6, 3, 1, 1), w2=(6, 6, 1, 1), w3=(6, 6, 1, 1), w4=(2, 6, 1, 1),
    )  # fmt: skip
    found = find_groups(model, HERE)
    assert sizes(found) == [6]
    assert {part.name for part in found.groups[0].producers} == {"w1", "w2", "w3"}
    assert {part.name for part in found.groups[0].consumers} == {"w2", "w3", "w4"}
    assert_free(model, found)


def test_parts_of_a_concatenation_keep_groups_of_their_own() -> None:
    model = text(
        "a = Conv (x, w1)  b = Conv (x, w2)  c = Concat <axis = 1> (a, b)  y = Conv (c, w3)",
        w1=(6, 3, 1, 1), w2=(4, 3, 1, 1), w3=(2, 10, 1, 1),
    )  # fmt: skip
    found = find_groups(model, HERE)
    assert [(g.size, g.consumers[0].start) for g in found.groups] == [(6, 0), (4, 6)]
    assert_free(model, found)


def test_a_flattened_channel_is_a_run_of_columns() -> None:
    model = text("a = Conv (x, w1)  b = Flatten (a)  y = Gemm (b, w2)", w1=(6, 3, 1, 1), w2=(96, 5))
    found = find_groups(model, HERE)
    assert [(part.axis, part.run) for part in found.groups[0].consumers] == [(0, 16)]
    assert_free(model, found)


def test_a_depthwise_convolution_moves_along() -> None:
    model = text(
        "a = Conv (x, w1)  b = Conv <group = 6> (a, w2, b2)  y = Conv (b, w3)",
        w1=(6, 3, 1, 1), w2=(12, 1, 1, 1), b2=(12,), w3=(2, 12, 1, 1),
    )  # fmt: skip
    found = find_groups(model, HERE)
    assert sizes(found) == [6]
    assert {(part.name, part.run) for part in found.groups[0].constants} == {("w1", 1), ("w2", 2), ("b2", 2), ("w3", 2)}
    assert_free(model, found)


def test_zero_channels_that_are_padded_have_an_order_of_their_own() -> None:
    """The shortcut of the CIFAR ResNets: a stream continues in the middle of a wider one."""
    model = text(
        """p = Constant <value_ints = [0, 2, 0, 0, 0, 2, 0, 0]> ()
        a = Conv (x, w1)  b = Pad (a, p)  c = Conv (a, w2)  d = Add (b, c)  y = Conv (d, w3)""",
        w1=(6, 3, 1, 1), w2=(10, 6, 1, 1), w3=(2, 10, 1, 1),
    )  # fmt: skip
    found = find_groups(model, HERE)
    assert sorted(sizes(found)) == [2, 2, 6]
    assert_free(model, found)


def test_weights_behind_other_nodes_and_in_constants() -> None:
    model = text(
        """w1 = Transpose <perm = [3, 2, 0, 1]> (stored)  a = Conv (x, w1)
        w2 = Constant <value = float[2, 4, 1, 1] {1, 2, 3, 4, 5, 6, 7, 8}> ()
        s = Constant <value_ints = [4, 6, 1, 1]> ()  flat = Identity (rows)  w3 = Reshape (flat, s)
        b = Conv (a, w3)  y = Conv (b, w2)""",
        stored=(1, 1, 6, 3), rows=(24,),
    )  # fmt: skip
    model.graph.node[0].attribute[0].ints[:] = [2, 3, 0, 1]
    found = find_groups(model, HERE)
    assert sizes(found) == [4], "24 entries in a row do not tell inputs from outputs, but 4 outputs are runs of 6"
    assert_free(model, found)


def test_shared_weights_tie_their_axes() -> None:
    model = text(
        "a = Conv (x, w1)  b = Conv (a, w2)  c = Relu (b)  d = Conv (c, w2)  y = Conv (d, w3)",
        w1=(6, 3, 1, 1), w2=(6, 6, 1, 1), w3=(2, 6, 1, 1),
    )  # fmt: skip
    found = find_groups(model, HERE)
    assert sizes(found) == [6], "inputs and outputs of a layer that is run twice"
    assert_free(model, found)


# What is pinned


@pytest.mark.parametrize(
    ("nodes", "shapes", "reason"),
    [
        ("y = Softmax <axis = 1> (a)", {}, "Softmax"),
        ("y = Conv <group = 2> (a, w2)", {"w2": (4, 3, 1, 1)}, "2 groups of 3 channels"),
        ("y = ConvTranspose <group = 2> (a, w2)", {"w2": (6, 2, 1, 1)}, "2 groups of 3 channels"),
        ("w = Relu (w2)  y = Conv (a, w)", {"w2": (2, 6, 1, 1)}, "is computed by Relu"),
        ("w = Reshape (x, s)  y = Conv (a, w)", {}, "is not a constant"),
        ("b = Conv (a, w2)  c = Shape (w2)  y = Expand (b, c)", {"w2": (6, 6, 1, 1)}, "is also read by Shape"),
        ("b = Reshape (a, t)  c = Transpose <perm = [0, 2, 1, 3, 4]> (b)  y = Reshape (c, u)", {}, "mixes channels"),
        ("y = LRN <size = 3> (a)", {}, "LRN"),
        ("y = ReduceMean <axes = [1]> (a)", {}, "reduces channels"),
        ("y = ReduceMean (a)", {}, "reduces channels"),
        ("y, i = MaxPool <kernel_shape = [2, 2]> (a)", {}, "indices"),
        ("y = Add (a, x1)", {}, "whose channels are not known"),
        ("b = Transpose <perm = [0, 2, 3, 1]> (a)  y = MaxPool <kernel_shape = [2, 2]> (b)", {}, "not the channels'"),
        ("b = Transpose <perm = [0, 3, 2, 1]> (a)  y = Conv (b, w2)", {"w2": (2, 4, 1, 1)}, "another axis"),
        ("y = MatMul (a, w2)", {"w2": (4, 5)}, "another axis"),
        ("y = MatMul (w2, a)", {"w2": (4, 4)}, "not a constant"),
        ("b = Flatten (a)  y = Gemm <transA = 1> (b, w2)", {"w2": (2, 5)}, "transposes its input"),
        ("b = DepthToSpace <blocksize = 1> (a)  y = Relu (b)", {}, "DepthToSpace"),
        ("y = Pad <mode = \"reflect\"> (a, pads)", {}, "repeats or drops"),
        ("b = Split <axis = 1> (a)  y = Relu (b)", {}, "output"),
        ("n = Shape (x)  k = Slice (n, zero, one)  b = Split <axis = 1> (a, k)  y = Relu (b)", {}, "not constant"),
        ("n = Shape (x)  b = Slice (a, zero, n)  y = Relu (b)", {}, "bounds that are not"),
        ("y = Slice (a, zero, six, one, two)", {}, "skips channels"),
        ("n = Shape (x)  k = Concat <axis = 0> (n, n)  y = Pad (a, k)", {}, "pads that are not"),
        ("y = Resize (a, , factors)", {}, "resize the axis"),
        ("y = Concat <axis = 2> (a, x1)", {}, "channels that are not known"),
        ("y = BatchNormalization <training_mode = 1> (a, v, v, v, v)", {"v": (6,)}, "output"),
        ("b = Flatten (a)  c = Reshape (b, u)  y = Add (a, c)", {}, "output"),
    ],
)  # fmt: skip
def test_what_is_pinned_says_why(nodes: str, shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    model = text(f"a = Conv (x, w1)  {nodes}", 13, w1=(6, 3, 1, 1), **shapes)
    for name, values in {
        "s": [-1, 6, 1, 1],
        "t": [0, 2, 3, 4, 4],
        "u": [0, 6, 4, 4],
        "pads": [0, 1, 0, 0] * 2,
        "zero": [0],
        "one": [1],
        "two": [2],
        "six": [6],
    }.items():
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    if "factors" in nodes:
        factors = np.array([1, 2, 1, 1], np.float32)
        model.graph.initializer.append(numpy_helper.from_array(factors, "factors"))
    if "x1" in nodes:
        model.graph.input.append(helper.make_tensor_value_info("x1", TensorProto.FLOAT, ["N", 6, 4, 4]))
    found = find_groups(model, HERE)
    assert not found.groups
    assert any(reason in pinned.reason for pinned in found.pinned), [pinned.reason for pinned in found.pinned]
    assert all("\n" not in pinned.reason for pinned in found.pinned)


def test_what_a_subgraph_reads_is_pinned() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        net (float[N, 3, 4, 4] x, bool c) => (y) {
          a = Conv (x, w1)
          b = If (c) <then_branch = t () => (t1) { t1 = Relu (a) }, else_branch = e () => (e1) { e1 = Neg (a) }>
          y = Conv (b, w2)
        }"""
    )
    for name, shape in {"w1": (6, 3, 1, 1), "w2": (2, 6, 1, 1)}.items():
        model.graph.initializer.append(numpy_helper.from_array(whole(np.random.default_rng(0), *shape), name))
    found = find_groups(model, HERE)
    assert not found.groups
    assert {"'a' is read in a subgraph", "If 'b' may mix channels"} <= {pinned.reason for pinned in found.pinned}


def test_an_old_opset_is_left_alone() -> None:
    model = text("a = Conv (x, w1)  y = Conv (a, w2)", 6, w1=(6, 3, 1, 1), w2=(2, 6, 1, 1))
    assert find_groups(model, HERE) == Groups((), ())


# Applying


def test_all_kinds_of_storage_are_moved_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    b = Builder(0)
    y = b.conv(b.conv("x", 3, 6), 6, 2)
    plain = b.model(y, 4)
    order = rng.permutation(6)
    group = find_groups(plain, HERE).groups[0]
    expected = copy_of(plain)
    apply(expected, group, order, HERE)
    typed = copy_of(plain)
    for tensor in typed.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        tensor.ClearField("raw_data")
        tensor.float_data.extend(values.ravel().tolist())
    apply(typed, group, order, HERE)
    external = copy_of(plain)
    onnx.save(external, tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    external = load(tmp_path / "net.onnx")
    assert find_groups(external, tmp_path).groups[0] == group
    apply(external, group, order, tmp_path)
    for model in (typed, external):
        for one, other in zip(expected.graph.initializer, model.graph.initializer, strict=True):
            np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other, str(tmp_path)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "the files are not touched"


def test_only_constants_change() -> None:
    model = random_net(3, ["conv", "add", "concat", "norm"])
    twin = shuffled(model, find_groups(model, HERE).groups, 1)
    shapes = [[(tensor.name, tuple(tensor.dims)) for tensor in each.graph.initializer] for each in (model, twin)]
    assert shapes[0] == shapes[1]
    for each in (model, twin):
        del each.graph.initializer[:]
    assert model == twin


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 5, 6], np.arange(6).reshape(2, 3)])
def test_what_is_no_permutation_is_refused(order: object) -> None:
    model = text("a = Conv (x, w1)  y = Conv (a, w2)", w1=(6, 3, 1, 1), w2=(2, 6, 1, 1))
    with pytest.raises(OptionError, match="not the numbers 0 to 5, each once") as caught:
        apply(model, find_groups(model, HERE).groups[0], order, HERE)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# Real models

FREE = {
    "models/squeezenet": (25, 2944),
    "models/mobilenetv1": (14, 5984),
    "models/mobilenetv2": (25, 9128),
    "models/resnet20": (14, 400),
    "models/resnet20_bn": (14, 400),
    "models/resnet56": (32, 1072),
    "zoo/yolox_nano": (67, 5472),
    "zoo/squeezenet1.1_fp16_op7": (25, 2944),
    "zoo/ppocr_mobile_v2_cls": (26, 1338),
    "zoo/digits_extdata": (4, 480),
    "zoo/oww_embedding": (19, 1320),
    "zoo/fastestdet": (22, 1248),
    "zoo/silero_vad_16k_op15": (4, 385),
    "zoo/candy_style_winml": (7, 368),
}


@pytest.mark.parametrize("name", FREE)
def test_real_models_give_the_same(name: str, data_dir: Path, tmp_path: Path) -> None:
    found = data_dir / name
    path = next(found.glob("*.onnx")) if found.is_dir() else found.with_suffix(".onnx")
    model = load(path)
    groups = find_groups(model, path.parent).groups
    assert (len(groups), sum(group.size for group in groups)) == FREE[name]
    feed = dict(generate_feeds(path, seed=0)[0])
    expected = run(open_session(path), feed)
    twin = shuffled(model, groups, 0, path.parent)
    save(twin, tmp_path / "twin.onnx", path.parent)
    results = run(open_session(tmp_path / "twin.onnx"), feed)
    tolerance = 2e-2 if "fp16" in name else 1e-5
    for key, before in expected.items():
        if isinstance(before, np.ndarray) and before.dtype.kind == "f":
            error = np.linalg.norm(results[key].astype(np.float64) - before) / np.linalg.norm(before.astype(np.float64))
            assert error < tolerance, key


@pytest.mark.parametrize("name", ["bert_tokenizer_customop", "mobilenetv2_cifar10_int8", "silero_vad_v4_old", "dtln_1"])
def test_models_without_free_channels_are_read(name: str, data_dir: Path) -> None:
    path = next((data_dir / "zoo" / name).glob("*.onnx"))
    assert find_groups(load(path), path.parent).groups == ()
