"""Sessions, generated inputs and data sources, on models of a few lines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vqonnx.errors import DataError, ModelError, OptionError, VqonnxError
from vqonnx.feeds import read_feeds
from vqonnx.generate import generate_feeds
from vqonnx.runtime import Input, get_library_path, open_session, read_inputs, run

ZOO = 22
X = Input("x", np.dtype(np.float32), ("N", 3))


def parse(graph: str, functions: str = "", ir: int = 8) -> bytes:
    text = f'<ir_version: {ir}, opset_import: ["": 13, "local": 1]> {graph} {functions}'
    return onnx.parser.parse_model(text).SerializeToString()


RELU = parse("g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")


def feeds_of(source: Any, *inputs: Input, batch: int = 16) -> list[dict[str, Any]]:
    return list(read_feeds(source, inputs, batch=batch))


# Sessions


def test_the_library_is_in_the_package() -> None:
    assert Path(get_library_path()).is_file()


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vqonnx

    monkeypatch.setattr(vqonnx, "__path__", [str(tmp_path)])
    with pytest.raises(VqonnxError, match=r"missing; reinstall .* C\+\+20"):
        get_library_path()


def test_a_session_opens_with_the_library() -> None:
    feed = {"x": np.array([[-1, 0, 1]], np.float32)}
    np.testing.assert_array_equal(run(open_session(RELU, library=True), feed)["y"], [[0, 0, 1]])


@pytest.mark.parametrize("optimise", [True, False])
def test_sessions_run(optimise: bool, tmp_path: Path) -> None:
    path, written = tmp_path / "relu.onnx", tmp_path / "optimised.onnx"
    path.write_bytes(RELU)
    session = open_session(path, threads=1, optimise=optimise, optimised_path=written)
    np.testing.assert_array_equal(run(session, {"x": np.full((2, 3), -1, np.float32)})["y"], np.zeros((2, 3)))
    assert onnx.load(written).graph.node


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
@pytest.mark.parametrize("read", [open_session, read_inputs, generate_feeds])
def test_an_unreadable_model_is_named_in_one_line(content: bytes | None, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.onnx") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)


def test_a_foreign_operator_is_named() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 13, "com.acme": 1]>'
        "g (float[1] x) => (float[1] y) { y = com.acme.Wobble(x) }"
    )
    with pytest.raises(ModelError, match=r"operators of domain com\.acme \(Wobble\).*does not have"):
        open_session(model.SerializeToString())


def test_an_operator_of_ours_asks_for_the_library() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 13, "vqonnx": 1]> g (float[1] x) => (float[1] y) { y = vqonnx.Decode(x) }'
    )
    with pytest.raises(ModelError, match="open it with the vqonnx library"):
        open_session(model.SerializeToString())


@pytest.mark.parametrize(
    "feed",
    [{}, {"x": np.zeros((1, 4), np.float32)}, {"x": np.zeros((1, 3), np.int32)}, {"x": "text"}, {"x": None}],
    ids=["missing", "shape", "dtype", "text", "none"],
)
def test_a_feed_that_does_not_run_is_a_data_error(feed: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="does not run") as caught:
        run(open_session(RELU), feed)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_inputs_are_read_without_initializers() -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["N", 3]), value("w", TensorProto.FLOAT, [3, 2])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")],
    )
    model = helper.make_model(graph, ir_version=3, opset_imports=[helper.make_opsetid("", 8)]).SerializeToString()
    assert read_inputs(model) == (X,)
    np.testing.assert_array_equal(run(open_session(model), generate_feeds(model)[0])["y"].shape, (1, 2))


@pytest.mark.parametrize("spelling", ["", "?", "None", "-1"])
def test_unknown_sizes_have_no_name(spelling: str) -> None:
    model = onnx.load_model_from_string(RELU)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = spelling
    assert read_inputs(model.SerializeToString())[0].shape == (None, 3)


def test_inputs_read_like_onnx() -> None:
    assert str(X) == "float32[N, 3]"
    assert str(Input("t", np.dtype(object), (None,))) == "string[?]"
    assert str(Input("s", None, None)) == "?[?]"


# Generated inputs


def test_generated_inputs_have_the_models_types() -> None:
    names = ["float", "float16", "double", "int8", "uint8", "int32", "int64", "bool", "string"]
    inputs = ", ".join(f"{name}[2, 3] {name[0]}{number}" for number, name in enumerate(names))
    nodes = " ".join(f"o{number} = Identity({name[0]}{number})" for number, name in enumerate(names))
    outputs = ", ".join(f"{name}[2, 3] o{number}" for number, name in enumerate(names))
    model = parse(f"g ({inputs}, int64 rate) => ({outputs}) {{ {nodes} unused = Identity(rate) }}")
    feed = generate_feeds(model)[0]
    dtypes = [np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64, bool, object, np.int64]
    assert [array.dtype for array in feed.values()] == [np.dtype(dtype) for dtype in dtypes]
    assert [array.shape for array in feed.values()] == [(2, 3)] * 9 + [()]
    for array in feed.values():
        assert all(0 <= float(value) <= 1 for value in array.ravel())


@given(seed=st.integers(0, 2**32), count=st.integers(1, 4))
def test_the_same_seed_gives_the_same_feeds(seed: int, count: int) -> None:
    longer, shorter = generate_feeds(RELU, seed=seed, count=count + 1), generate_feeds(RELU, seed=seed, count=count)
    assert len(shorter) == count
    for one, other in zip(longer, shorter, strict=False):
        np.testing.assert_array_equal(one["x"], other["x"])
    assert not np.array_equal(longer[0]["x"], longer[1]["x"])


def test_a_symbolic_size_is_the_same_everywhere() -> None:
    model = parse("g (float[batch, T] a, float[2, batch, T] b) => (float[2, batch, T] y) { y = Add(a, b) }")
    feed = generate_feeds(model)[0]
    assert feed["a"].shape[0] == feed["b"].shape[1] == 1
    assert feed["a"].shape[1] == feed["b"].shape[2] > 1


def test_sizes_are_tried_until_the_model_runs() -> None:
    # Only T = 16 can be reshaped to [1, 4, 4].
    model = parse(
        "g (float[N, T] x) => (float[N, 4, 4] y) <int64[3] to = {-1, 4, 4}, int64[3] one = {1, 4, 4}>"
        "{ z = Reshape(x, to) y = Reshape(z, one) }"
    )
    assert generate_feeds(model)[0]["x"].shape == (1, 16)


def test_an_open_image_gets_three_channels() -> None:
    model = parse(
        "g (float[N, C, H, W] x) => (float[N, 2, H, W] y) <float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}> { y = Conv(x, w) }"
    )
    assert generate_feeds(model)[0]["x"].shape == (1, 3, 224, 224)


def test_given_shapes_win_and_bind_their_names() -> None:
    model = parse("g (float[N, T] a, float[T] b, float[K] c) => (float[N, T] y) { y = Add(a, b) z = Identity(c) }")
    feed = generate_feeds(model, shapes={"a": [5, 7]})[0]
    assert (feed["a"].shape, feed["b"].shape) == ((5, 7), (7,))


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"z": [1, 3]}, "'z'.*x"),
        ({"x": [1]}, r"\[1\].*float32\[N, 3\]"),
        ({"x": [1, 4]}, r"\[1, 4\]"),
        ({"x": [0, 3]}, "0"),
    ],
)
def test_wrong_shapes_are_refused(shapes: dict[str, list[int]], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        generate_feeds(RELU, shapes=shapes)


def test_a_model_that_runs_on_nothing_says_so() -> None:
    model = parse("g (float[T] x) => (float[77] y) <int64[1] to = {77}> { y = Reshape(x, to) }")
    with pytest.raises(DataError, match=r"--input-shapes or calibration data \(last try x \[.*Reshape"):
        generate_feeds(model)
    assert generate_feeds(model, shapes={"x": [77]})[0]["x"].shape == (77,)


def test_sequences_ask_for_calibration_data() -> None:
    model = parse("g (seq(float[N]) s) => (int64 n) { n = SequenceLength(s) }")
    with pytest.raises(DataError, match=r"'s'.*calibration data"):
        generate_feeds(model)
    feeds = feeds_of([{"s": [np.ones(2, np.float32)] * 3}], *read_inputs(model))
    assert run(open_session(model), feeds[0])["n"] == 3


def test_the_zoo_gets_inputs(data_dir: Path) -> None:
    paths = sorted(data_dir.glob("zoo/*/*.onnx"))
    assert len(paths) == ZOO
    refused = []
    for path in (*paths, *sorted(data_dir.glob("models/*.onnx"))):
        try:
            feeds = generate_feeds(path)
        except ModelError as error:
            refused.append((path.stem, str(error)))
            continue
        assert len(feeds) == 2, path
        assert list(read_feeds(feeds, read_inputs(path))), path
    ((name, reason),) = refused
    assert name == "bert_tokenizer_customop"
    assert "operators of domain ai.onnx.contrib" in reason


# Reading data


@given(rows=st.integers(1, 50), batch=st.integers(1, 20))
def test_batches_put_together_are_the_array(rows: int, batch: int) -> None:
    array = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    parts = [feed["x"] for feed in feeds_of(array, X, batch=batch)]
    assert all(len(part) == batch for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= batch
    np.testing.assert_array_equal(np.concatenate(parts), array)


@given(rows=st.integers(4, 50), size=st.integers(1, 4))
def test_a_fixed_batch_is_filled_and_the_rest_dropped(rows: int, size: int) -> None:
    parts = [feed["x"] for feed in feeds_of({"x": np.zeros((rows, 3), np.float32)}, Input("x", X.dtype, (size, 3)))]
    assert [len(part) for part in parts] == [size] * (rows // size)


def test_dropped_rows_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        feeds_of(np.zeros((7, 3), np.float32), Input("x", X.dtype, (4, 3)))
    assert "3 of 7 rows dropped" in caplog.text


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(20, 3)

    class Reader:
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

        def rewind(self) -> None:
            self.rest = iter([{"x": array[:16]}, {"x": array[16:]}])

    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "all.npz", x=array, labels=np.arange(20))
    np.savez(tmp_path / "folder" / "b.npz", x=array[16:])
    np.savez_compressed(tmp_path / "folder" / "a.npz", x=array[:16])
    dicts = [{"x": array[:16]}, {"x": array[16:], "labels": 3}]
    once = (feed for feed in dicts)
    sources = [
        str(tmp_path / "all.npz"),
        tmp_path / "all.npz",
        tmp_path / "folder",
        array,
        {"x": array},
        dicts,
        once,
        Reader(),
    ]
    for source in sources:
        feeds = read_feeds(source, [X])
        assert read_feeds(feeds, [X]) is feeds
        for _ in range(1 if feeds.once else 2):
            np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), array, err_msg=str(source))


def test_a_source_that_runs_dry_says_so() -> None:
    class Reader:
        rest = iter([{"x": np.zeros((1, 3), np.float32)}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    for source in (Reader(), iter([{"x": np.zeros((1, 3), np.float32)}])):
        feeds = read_feeds(source, [X])
        assert feeds.once
        assert len(list(feeds)) == 1
        with pytest.raises(DataError, match="only once"):
            list(feeds)


def test_states_and_scalars_are_fed_whole() -> None:
    inputs = (X, Input("state", X.dtype, (2, "N", 4)), Input("rate", np.dtype(np.int64), ()))
    data = {"x": np.zeros((20, 3)), "state": np.zeros((2, 20, 4)), "rate": np.array(16000, np.int32)}
    (feed,) = feeds_of(data, *inputs)
    assert {name: (array.shape, array.dtype.name) for name, array in feed.items()} == {
        "x": ((20, 3), "float32"),
        "state": ((2, 20, 4), "float32"),
        "rate": ((), "int64"),
    }
    rates = [feed["rate"] for feed in feeds_of({"x": data["x"], "rate": data["rate"]}, X, inputs[2])]
    assert rates == [16000, 16000]


def test_inputs_of_unknown_rank_are_cut_too() -> None:
    feeds = feeds_of({"x": np.zeros((20, 3)), "y": np.zeros((20, 5, 5))}, X, Input("y", X.dtype, None))
    assert [feed["y"].shape for feed in feeds] == [(16, 5, 5), (4, 5, 5)]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 2), np.float32), r"'x' is float32\[4, 2\]; the model wants float32\[N, 3\]"),
        (np.zeros((4, 3, 1), np.float32), r"float32\[4, 3, 1\]"),
        (np.float32(1), r"float32\[\]"),
        (np.zeros((4, 3), np.uint8), "uint8.*wants float32"),
        ([[1.0, 2.0], [3.0]], "'x' is not an array"),
        (np.full((4, 3), np.nan, np.float32), "'x'.*NaN or infinite"),
        (np.full((4, 3), 1e300), "'x'.*NaN or infinite"),
    ],
)
def test_data_that_do_not_fit_name_input_and_shapes(array: Any, says: str) -> None:
    for source in ({"x": array}, [{"x": array}]):
        with pytest.raises(DataError, match=says):
            feeds_of(source, X)


def test_the_batch_with_the_fault_is_named(tmp_path: Path) -> None:
    array = np.zeros((40, 3), np.float32)
    array[35] = np.inf
    np.savez(tmp_path / "x.npz", x=array)
    with pytest.raises(DataError, match=r"x\.npz: batch 2: input 'x'"):
        feeds_of(tmp_path / "x.npz", X)


def test_integers_are_cast_only_without_loss() -> None:
    ids = Input("ids", np.dtype(np.int32), ("N",))
    assert feeds_of({"ids": np.array([1, -(2**31)])}, ids)[0]["ids"].dtype == np.int32
    for wrong in (np.array([2**31]), np.array([1.0]), np.array([2**63], np.uint64), np.array([True])):
        with pytest.raises(DataError, match="'ids'"):
            feeds_of({"ids": wrong}, ids)


def test_strings_are_fed_as_objects() -> None:
    (feed,) = feeds_of({"t": np.array(["a", "bc"])}, Input("t", np.dtype(object), ("N",)))
    assert feed["t"].tolist() == ["a", "bc"]
    assert feed["t"].dtype == object


@pytest.mark.parametrize("source", [{"y": np.zeros((1, 3))}, {"x": np.zeros((1, 3)), "y": 1}, [{"y": 1}]])
def test_unknown_and_missing_names_are_refused(source: Any) -> None:
    with pytest.raises(DataError, match="the model's inputs are x"):
        feeds_of(source, X)


def test_arrays_of_different_length_are_refused() -> None:
    y = Input("y", X.dtype, ("N",))
    with pytest.raises(DataError, match="'y' has 4 rows, 'x' has 5;"):
        feeds_of({"x": np.zeros((5, 3)), "y": np.zeros(4)}, X, y)
    with pytest.raises(DataError, match="3 inputs"):
        feeds_of(np.zeros((5, 3)), X, y, Input("z", X.dtype, ("N",)))


@pytest.mark.parametrize("source", [[], iter(()), {"x": np.zeros((0, 3), np.float32)}])
def test_no_data_are_an_error(source: Any) -> None:
    with pytest.raises(DataError, match="not a single batch"):
        feeds_of(source, X)


@pytest.mark.parametrize("source", [7, ["text"], [np.zeros((1, 3))]])
def test_other_things_are_no_data(source: Any) -> None:
    with pytest.raises(DataError, match="give a"):
        feeds_of(source, X)


def test_bad_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK no")
    (tmp_path / "x.csv").write_text("1")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("nowhere.npz", "empty", "broken.npz", "x.csv", "array.npz"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            feeds_of(tmp_path / name, X)


def test_unpickling_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"x\.npz"):
        feeds_of(tmp_path / "x.npz", X)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_absurd_numbers_of_threads_are_refused(threads: int) -> None:
    with pytest.raises(OptionError, match=f"threads is {threads}; choose 1 to"):
        open_session(b"", threads=threads)
