"""The walk sees what a run of the whole model sees, runs every node once, and cleans up."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, load_model_from_string, numpy_helper

import vqonnx.calibrate
from vqonnx.calibrate import Walk
from vqonnx.errors import DataError
from vqonnx.graph import Site, find
from vqonnx.moments import Moments, MomentsAccumulator
from vqonnx.scope import attributes
from vqonnx.unfold import unfold

ALL = 10**6  # more positions than any image here has: no choice, so that results can be compared
Feeds = list[dict[str, NDArray[Any]]]


# ---------------------------------------------------------------- models


def random(*shape: int, seed: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def tensor(name: str, *shape: int, seed: int = 0) -> TensorProto:
    return numpy_helper.from_array(random(*shape, seed=seed or len(name) + ord(name[-1])), name)


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def node(op_type: str, inputs: str, output: str, **values: Any) -> NodeProto:
    """A node that is called as its (first) output."""
    outputs = output.split()
    return helper.make_node(op_type, [i if i != "-" else "" for i in inputs.split()], outputs, outputs[0], **values)


def build(
    nodes: list[NodeProto],
    weights: list[TensorProto],
    *,
    inputs: Mapping[str, list[Any]] | None = None,
    outputs: Iterable[str] = ("y",),
    weights_are_inputs: bool = False,
    ir_version: int = 8,
) -> ModelProto:
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (inputs or {"x": ["N", 3, 8, 8]}).items()
    ]
    if weights_are_inputs:
        given += [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "net", given, results, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)


def cnn(**options: Any) -> ModelProto:
    """Conv, Relu, Conv, Add, pooling, Gemm, MatMul; weights of the last two behind Transpose and Constant nodes."""
    nodes = [
        node("Constant", "", "w4", value=tensor("w4", 6, 5)),
        node("Transpose", "w3", "w3t", perm=[1, 0]),
        node("Conv", "x w1 b1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2 -", "c2", pads=[1, 1, 1, 1], group=2),
        node("Add", "c2 r1", "a"),
        node("GlobalAveragePool", "a", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f w3t b3", "g"),
        node("Relu", "g", "r2"),
        node("MatMul", "r2 w4", "y"),
    ]
    weights = [tensor("w1", 4, 3, 3, 3), tensor("b1", 4), tensor("w2", 4, 2, 3, 3), tensor("w3", 6, 4), tensor("b3", 6)]
    return build(nodes, weights, **options)


def with_if() -> ModelProto:
    """Conv, then an If with a Conv in one branch that also reads an outer weight, then a MatMul."""
    then = helper.make_graph(
        [
            node("Conv", "r1 inner", "t1", pads=[1, 1, 1, 1]),
            node("Mul", "t1 outer", "t2"),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("t2", TensorProto.FLOAT, None)],
        [tensor("inner", 4, 4, 3, 3)],
    )
    other = helper.make_graph(
        [node("Neg", "r1", "e1")], "else", [], [helper.make_tensor_value_info("e1", TensorProto.FLOAT, None)]
    )
    nodes = [
        node("Conv", "x w1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("ReduceSum", "x", "s", keepdims=0),
        node("Greater", "s zero", "positive"),
        node("If", "positive", "branch", then_branch=then, else_branch=other),
        node("GlobalAveragePool", "branch", "p"),
        node("Flatten", "p", "f"),
        node("MatMul", "f w2", "y"),
    ]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    return build(nodes, [tensor("w1", 4, 3, 3, 3), tensor("w2", 4, 5), tensor("outer", 1, 4, 1, 1), zero])


def two_branches() -> ModelProto:
    """The input feeds a layer and a node that also reads what no layer needs; a bias is made at run time."""
    nodes = [
        node("Abs", "x", "q"),
        node("Neg", "q", "z"),
        node("Conv", "x w1", "c1"),
        node("Add", "x z", "side"),
        node("GlobalAveragePool", "side", "sp"),
        node("Flatten", "sp", "made"),
        node("GlobalAveragePool", "x", "xp"),
        node("Flatten", "xp", "xf"),
        node("Gemm", "xf w3 made", "bent"),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2", "y"),
    ]
    weights = [tensor("w1", 4, 3, 3, 3), tensor("w2", 5, 4, 3, 3), tensor("w3", 3, 3)]
    return build(nodes, weights, outputs=("y", "side", "bent"))


def shared() -> ModelProto:
    """One weight for two layers, and a skip over both."""
    nodes = [
        node("Conv", "x w0", "c0"),
        node("Conv", "c0 w1", "c1", pads=[1, 1, 1, 1]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w1", "c2", pads=[1, 1, 1, 1]),
        node("Add", "c2 c0", "a"),
        node("Conv", "a w2", "y"),
    ]
    return build(nodes, [tensor("w0", 4, 3, 3, 3), tensor("w1", 4, 4, 3, 3), tensor("w2", 2, 4, 1, 1)])


def sequences() -> ModelProto:
    """A sequence is alive where the model is cut."""
    nodes = [
        node("SplitToSequence", "x", "parts", axis=1, keepdims=1),
        node("Conv", "x w1", "c1"),
        node("GlobalAveragePool", "c1", "p"),
        node("ConcatFromSequence", "parts", "joined", axis=1),
        node("Mul", "joined p", "m"),
        node("Conv", "m w2", "y"),
    ]
    return build(nodes, [tensor("w1", 3, 3, 3, 3), tensor("w2", 5, 3, 3, 3)])


def left_out() -> ModelProto:
    """Outputs and inputs that are left out: both have the empty name."""
    nodes = [
        node("Conv", "x w1", "c1"),
        helper.make_node("Dropout", ["x"], ["unused", ""], "unused"),
        helper.make_node("Dropout", ["c1"], ["d", ""], "d"),
        node("Resize", "d - scales", "u", mode="nearest"),
        node("Clip", "u - six", "k"),
        node("Conv", "k w2 -", "c2"),
        node("Conv", "c2 w3 -", "y"),
    ]
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    six = numpy_helper.from_array(np.float32(6), "six")
    return build(nodes, [tensor("w1", 4, 3, 3, 3), tensor("w2", 5, 4, 3, 3), tensor("w3", 2, 5, 1, 1), scales, six])


MODELS = {
    "left-out": left_out,
    "cnn": cnn,
    "cnn-weights-are-inputs": lambda: cnn(weights_are_inputs=True, ir_version=3),
    "if": with_if,
    "two-branches": two_branches,
    "shared": shared,
    "sequences": sequences,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def images(*sizes: int, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    # The sign of the mean changes, so that both branches of an If are taken.
    return [
        {"x": (rng.normal(size=(n, 3, 8, 8)) + (0.3 if at % 2 else -0.3)).astype(np.float32)}
        for at, n in enumerate(sizes)
    ]


# ---------------------------------------------------------------- the truth


def with_weight(model: ModelProto, name: str, values: NDArray[np.float32]) -> ModelProto:
    """The model with another constant called ``name``, whatever made it before."""
    changed = ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    kept_nodes = [entry for entry in graph.node if name not in entry.output]
    kept = [entry for entry in graph.initializer if entry.name != name]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept_nodes)
    graph.initializer.extend([*kept, numpy_helper.from_array(values, name)])
    return changed


def true_moments(
    model: ModelProto, site: Site, feeds: Feeds, order: str = "ihw", elem_type: int = TensorProto.FLOAT
) -> Moments:
    """From a run of the whole model, whose layer inputs are made outputs."""
    name = site.node.input[0]
    seen = [feed[name] for feed in feeds if name in feed]
    if not seen:
        opened = ModelProto()
        opened.CopyFrom(model)
        opened.graph.output.append(helper.make_tensor_value_info(name, elem_type, None))
        session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
        seen = [session.run([name], feed)[0] for feed in feeds]
    rows = [unfold(site.op_type, attributes(site.node), site.shape, x, order=order) for x in seen]
    accumulator = MomentsAccumulator(rows[0].shape[0], rows[0].shape[2])
    accumulator.add(np.concatenate(rows, axis=1))
    return accumulator.result()


def assert_same(found: Moments, expected: Moments, where: str) -> None:
    assert found.rows == expected.rows, where
    assert found.groups == expected.groups, where
    scale = max(float(np.abs(expected.sums).max()), 1)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-4, atol=1e-5 * scale, err_msg=where)
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        for mine, yours in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, yours, rtol=1e-4, atol=1e-5 * np.abs(yours).max(), err_msg=where)


def sites_of(model: ModelProto) -> tuple[Site, ...]:
    found = find(model, ".").sites
    assert found
    return found


def walk_all(model: ModelProto, feeds: Iterable[Mapping[str, Any]], **options: Any) -> dict[str, Moments]:
    sites = sites_of(model)
    with Walk(model, ".", sites, feeds, positions=ALL, **options) as walk:
        return {site.name: walk.observe(site, "ihw") for site in sites if walk.can_observe(site)}


# ---------------------------------------------------------------- what is seen


@every_model
@pytest.mark.parametrize("order", ["ihw", "hwi"])
def test_unchanged_layers_see_what_they_see_in_the_whole_model(make: Any, order: str) -> None:
    model, feeds = make(), images(3, 3, 2)
    sites = sites_of(model)
    seen = []
    with Walk(model, ".", sites, feeds, positions=ALL) as walk:
        for site in sites:
            if walk.can_observe(site):
                found = walk.observe(site, order)
                assert_same(found, true_moments(model, site, feeds, order), f"{site.name} {site.shape} {order}")
                seen.append(site.name)
    assert len(seen) >= 2


@every_model
def test_later_layers_see_the_replaced_ones_before_them(make: Any) -> None:
    model, feeds = make(), images(2, 2)
    rewritten, changed = model, []
    sites = sites_of(model)
    with Walk(model, ".", sites, feeds, positions=ALL) as walk:
        for number, site in enumerate(sites):
            if not walk.can_observe(site):
                continue
            where = f"{site.name} {site.shape} after {changed}"
            assert_same(walk.observe(site, "ihw"), true_moments(rewritten, site, feeds), where)
            if number % 3 == 1:
                continue  # some stay as they are
            values = random(*site.shape, seed=100 + number)
            walk.replace(site, values)
            rewritten = with_weight(rewritten, site.name, values)
            changed.append(site.name)
    assert changed


def test_a_replaced_weight_changes_what_is_seen() -> None:
    """The check above would also pass if nothing were replaced on both sides."""
    model, feeds = cnn(), images(2)
    first, second, *_ = sites_of(model)
    with Walk(model, ".", (first, second), feeds, positions=ALL) as walk:
        walk.observe(first, "ihw")
        walk.replace(first, np.zeros(first.shape, np.float32))
        found = walk.observe(second, "ihw")
    before = true_moments(model, second, feeds)
    assert not np.allclose(found.sums, before.sums)


@every_model
def test_the_model_is_not_changed(make: Any) -> None:
    model = make()
    before = model.SerializeToString(deterministic=True)
    sites = sites_of(model)
    with Walk(model, ".", sites, images(2), positions=ALL) as walk:
        for site in sites:
            if walk.can_observe(site):
                walk.observe(site, "ihw")
                walk.replace(site, random(*site.shape, seed=9))
    assert model.SerializeToString(deterministic=True) == before


def test_only_some_layers_may_be_observed() -> None:
    model, feeds = cnn(), images(2, 2)
    sites = sites_of(model)
    for chosen in (sites[1:], sites[::2], sites[-1:]):
        with Walk(model, ".", chosen, feeds, positions=ALL) as walk:
            for site in chosen:
                assert_same(walk.observe(site, "ihw"), true_moments(model, site, feeds), f"{site.name} of {chosen}")


def test_batches_may_have_different_sizes() -> None:
    model, feeds = cnn(), images(1, 7, 3)
    together = [{"x": np.concatenate([feed["x"] for feed in feeds])}]
    apart, whole = walk_all(model, feeds), walk_all(model, together)
    for name, moments in apart.items():
        assert_same(moments, whole[name], name)


def test_feeds_are_read_once() -> None:
    feeds = images(2, 2, 2)
    assert_same(walk_all(cnn(), iter(feeds))["w4"], walk_all(cnn(), feeds)["w4"], "w4")


def test_a_choice_of_positions_is_smaller_and_repeats() -> None:
    model, feeds = cnn(), images(3, 2)
    site = sites_of(model)[0]

    def observe(seed: int, positions: int = 10) -> Moments:
        with Walk(model, ".", [site], feeds, positions=positions, seed=seed) as walk:
            return walk.observe(site, "ihw")

    first, again, other, whole = observe(0), observe(0), observe(1), observe(0, ALL)
    assert (first.rows, whole.rows) == (5 * 10, 5 * 64)
    np.testing.assert_array_equal(first.sums, again.sums)
    assert not np.array_equal(first.sums, other.sums)
    # A sixth of the positions tells most of the whole: the mean square over all columns.
    means = [np.trace(found.blocks[0][0]) / found.rows for found in (first, whole)]
    assert means[0] == pytest.approx(means[1], rel=0.2)


def half(entry: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(entry).astype(np.float16), entry.name)


def test_half_precision_models_are_observed() -> None:
    model = build(
        [node("Conv", "x w1", "c1"), node("Relu", "c1", "r1"), node("Conv", "r1 w2", "y")],
        [half(tensor("w1", 4, 3, 3, 3)), half(tensor("w2", 5, 4, 3, 3))],
    )
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in images(2, 2)]
    first, second = sites_of(model)
    values = random(*first.shape, seed=7)
    with Walk(model, ".", (first, second), feeds, positions=ALL) as walk:
        walk.observe(first, "ihw")
        walk.replace(first, values)
        found = walk.observe(second, "ihw")
    rewritten = with_weight(model, first.name, values.astype(np.float16))
    expected = true_moments(rewritten, second, feeds, elem_type=TensorProto.FLOAT16)
    assert found.rows == expected.rows
    np.testing.assert_allclose(found.blocks[0][0], expected.blocks[0][0], rtol=0.02, atol=0.5)


# ---------------------------------------------------------------- how much is run


class Counting:
    """Stands in for `open_session` and `run` of the walk and notes what they are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[ModelProto] = []
        self.runs: Counter[int] = Counter()
        self._known: dict[int, int] = {}
        self._open, self._run = vqonnx.calibrate.open_session, vqonnx.calibrate.run
        monkeypatch.setattr(vqonnx.calibrate, "open_session", self.open)
        monkeypatch.setattr(vqonnx.calibrate, "run", self.run)

    def open(self, model: bytes, **options: Any) -> onnxruntime.InferenceSession:
        session = self._open(model, **options)
        self._known[id(session)] = len(self.models)
        self.models.append(load_model_from_string(model))
        self._keep = [*getattr(self, "_keep", []), session]  # so that no id is used twice
        return session

    def run(self, session: onnxruntime.InferenceSession, feed: Mapping[str, Any]) -> dict[str, Any]:
        self.runs[self._known[id(session)]] += 1
        return self._run(session, feed)


@every_model
def test_every_node_runs_at_most_once_for_each_batch(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    counting, model, feeds = Counting(monkeypatch), make(), images(2, 2, 1)
    sites = sites_of(model)
    observed = walk_all(model, feeds)
    assert len(counting.models) <= len(sites)
    fixed = {"w4", "w3t"}  # constants may be made again in each segment
    nodes = Counter(
        entry.name for segment in counting.models for entry in segment.graph.node if entry.name not in fixed
    )
    assert nodes, "nothing was run"
    assert set(nodes.values()) == {1}, f"{nodes}"
    assert set(counting.runs.values()) == {len(feeds)}, f"{counting.runs}"
    last = [site for site in sites if site.name in observed][-1]
    assert last.node.name not in nodes, "the last layer itself need not be run"


def test_what_no_layer_needs_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    walk_all(two_branches(), images(2))
    names = {entry.name for segment in counting.models for entry in segment.graph.node}
    assert names == {"c1", "r1", "xp", "xf"}
    counting.models.clear()
    walk_all(left_out(), images(2))
    assert "unused" not in {entry.name for segment in counting.models for entry in segment.graph.node}


def test_observing_a_layer_twice_runs_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counting, model = Counting(monkeypatch), cnn()
    sites = sites_of(model)
    with Walk(model, ".", sites, images(2), positions=ALL) as walk:
        first = walk.observe(sites[1], "ihw")
        count = len(counting.models)
        assert_same(walk.observe(sites[1], "ihw"), first, "w2")
        assert len(counting.models) == count


# ---------------------------------------------------------------- memory and files


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for temporary files, and no room in memory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(vqonnx.calibrate, "_MEMORY_LIMIT", 0)
    return tmp_path


@every_model
def test_batches_on_disk_give_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Any) -> None:
    model, feeds = make(), images(2, 3)
    in_memory = walk_all(model, feeds)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(vqonnx.calibrate, "_MEMORY_LIMIT", 0)
    on_disk = walk_all(model, feeds)
    assert in_memory.keys() == on_disk.keys()
    for name, moments in in_memory.items():
        np.testing.assert_array_equal(moments.sums, on_disk[name].sums, err_msg=name)
        for group, other in zip(moments.blocks, on_disk[name].blocks, strict=True):
            np.testing.assert_array_equal(group[0], other[0], err_msg=name)
    assert not list(tmp_path.iterdir())


def test_batches_lie_on_disk_and_only_those_of_one_cut(scratch: Path) -> None:
    model = cnn()
    sites = sites_of(model)
    with Walk(model, ".", sites, images(2, 3), positions=ALL) as walk:
        for site in sites:
            walk.observe(site, "ihw")
            folders = list(scratch.iterdir())
            assert len(folders) == 1, site.name
            assert len(list(folders[0].iterdir())) == 2, site.name
        sizes = [path.stat().st_size for path in folders[0].iterdir()]
        assert max(sizes) < 1000, f"only 6 numbers of each image are alive at the last layer, not images: {sizes}"
    assert not list(scratch.iterdir())


def test_what_fits_stays_in_memory(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = images(2, 2, 2)
    monkeypatch.setattr(vqonnx.calibrate, "_MEMORY_LIMIT", 2 * feeds[0]["x"].nbytes)
    site = sites_of(cnn())[0]
    with Walk(cnn(), ".", [site], feeds, positions=ALL):
        (folder,) = scratch.iterdir()
        assert len(list(folder.iterdir())) == 1
    assert not list(scratch.iterdir())


def test_a_batch_leaves_the_disk_once_it_has_been_read(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = cnn(), images(2, 3, 2, 4)
    counts = []
    original = vqonnx.calibrate.run

    def counted(*arguments: Any) -> Any:
        counts.append(len([path for path in scratch.rglob("*") if path.is_file()]))
        return original(*arguments)

    monkeypatch.setattr(vqonnx.calibrate, "run", counted)
    sites = sites_of(model)
    with Walk(model, ".", sites, feeds, positions=ALL) as walk:
        for site in sites:
            walk.observe(site, "ihw")
    assert len(counts) >= 2 * len(feeds)
    assert set(counts) == {len(feeds) - 1}, "the one that is being run is in memory"


def test_files_go_away_when_a_batch_does_not_run(scratch: Path) -> None:
    model, feeds = cnn(), [*images(2), {"x": np.zeros((2, 5, 8, 8), np.float32)}]
    later = sites_of(model)[1:]
    with Walk(model, ".", later, feeds) as walk, pytest.raises(DataError, match="does not run"):
        walk.observe(later[0], "ihw")
    gc.collect()
    assert not list(scratch.iterdir())


def test_files_go_away_when_the_data_cannot_be_read(scratch: Path) -> None:
    def feeds() -> Iterable[dict[str, Any]]:
        yield from images(2, 2)
        raise DataError("third batch: no such file")

    with pytest.raises(DataError, match="third batch"):
        walk_all(cnn(), feeds())
    gc.collect()
    assert not list(scratch.iterdir())


# ---------------------------------------------------------------- refusals


def test_a_layer_in_a_subgraph_cannot_be_observed() -> None:
    model = with_if()
    sites = {site.name: site for site in sites_of(model)}
    with Walk(model, ".", sites.values(), images(2)) as walk:
        assert {name: walk.can_observe(site) for name, site in sites.items()} == {
            "w1": True,
            "w2": True,
            "inner": False,
        }


def test_a_layer_of_a_constant_cannot_be_observed() -> None:
    nodes = [node("MatMul", "table w1", "k"), node("MatMul", "x w2", "m"), node("Add", "m k", "y")]
    model = build(nodes, [tensor("table", 1, 4), tensor("w1", 4, 5), tensor("w2", 6, 5)], inputs={"x": ["N", 6]})
    sites = {site.name: site for site in sites_of(model)}
    with Walk(model, ".", sites.values(), [{"x": np.ones((2, 6), np.float32)}]) as walk:
        assert not walk.can_observe(sites["w1"])
        assert walk.can_observe(sites["w2"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_name_the_layer(value: float) -> None:
    feeds = images(2, 2)
    feeds[1]["x"][1, 0, 3, 3] = value
    with pytest.raises(DataError, match=r"^w1: .*not finite"):
        walk_all(cnn(), feeds)


def test_a_value_that_becomes_infinite_names_the_layer_where_it_shows() -> None:
    model, feeds = cnn(), images(2)
    sites = sites_of(model)
    with Walk(model, ".", sites, feeds, positions=ALL) as walk:
        walk.observe(sites[0], "ihw")
        walk.replace(sites[0], np.full(sites[0].shape, 3e38, np.float32))
        with pytest.raises(DataError, match=r"^w2: .*not finite"):
            walk.observe(sites[1], "ihw")


def test_no_batch_is_an_error() -> None:
    model = cnn()
    with pytest.raises(DataError, match="no batch"):
        Walk(model, ".", sites_of(model), [])
