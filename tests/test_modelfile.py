"""Reading and writing model files: whole, or not at all, and above 2 GB with external data."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import constant, numbers, parse, store, subgraphs
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vqonnx import modelfile
from vqonnx.errors import InputError, ModelError
from vqonnx.form import Coded
from vqonnx.graph import find
from vqonnx.modelfile import (
    check_output,
    external_tensors,
    file_bytes,
    inlined,
    load,
    make_tensor,
    save,
    to_array,
    whole_or_nothing,
)
from vqonnx.place import Placement, place
from vqonnx.runtime import open_session, run

W = numbers((6, 4), 1)
BIG = numbers((24, 20), 2)  # 1920 bytes: above the size that stays in the graph
X = {"x": numbers((2, 6), 3), "c": np.array(True)}
SMALL = parse("(float[2, 6] x) => (float[R, C] y) { y = MatMul (x, w) }", w=W)


def model() -> ModelProto:
    """Tensors of every kind in every place that can hold one, above and below the limit of what stays in the graph."""
    functions = "layer (a) => (b) { t = Transpose (k)  b = MatMul (a, t) }"
    made = parse(
        """(float[2, 6] x, bool c) => (float[2, 20] y) {
          h = MatMul (x, w)
          i = If (c) <then_branch = t () => (float[R, C] a) { a = MatMul (h, v) },
                      else_branch = e () => (float[R, C] b) { b = MatMul (h, u) }>
          j = local.layer (i)
          k = MatMul (j, m)
          y = Add (k, n)
        }""",
        functions=functions,
        w=W,
    )
    made.graph.initializer.append(helper.make_tensor("n", TensorProto.FLOAT, (20,), numbers((20,), 4).tolist()))
    made.graph.node.insert(0, constant("m", BIG))
    made.functions[0].node.insert(0, constant("k", BIG[:, :].reshape(24, 20)))
    then_branch, else_branch = subgraphs(made)
    store(then_branch, v=numbers((4, 20), 5))
    else_branch.node.insert(0, constant("u", numbers((4, 20), 6)))
    onnx.checker.check_model(made, full_check=True)
    return made


def outputs(source: ModelProto | Path) -> list[NDArray[Any]]:
    session = open_session(source if isinstance(source, Path) else source.SerializeToString())
    names = {entry.name for entry in session.get_inputs()}
    found = []
    for condition in (True, False):
        feed = {name: value for name, value in (X | {"c": np.array(condition)}).items() if name in names}
        found += list(run(session, feed).values())
    return found


def external(source: ModelProto, folder: Path) -> Path:
    """Written by onnx with every tensor in another file."""
    path = folder / "external.onnx"
    copy = ModelProto.FromString(source.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="tensors.bin", size_threshold=0, convert_attribute=True)
    return path


# Reading


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(model(), tmp_path / "m.onnx", tmp_path)
    assert load(tmp_path / "m.onnx") == model()
    assert load(str(tmp_path / "m.onnx")) == model()
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read .No such file or directory."),
        (b"", r"the file is empty \(0 bytes\); export the model again"),
        (b"PK\x03\x04 a zip file, say", "not an ONNX model"),
        (b'{"format": "json"}', "not an ONNX model"),
        (ModelProto(ir_version=8).SerializeToString(), r"without a graph or opset"),
    ],
)
def test_unreadable_files_are_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"m\.onnx: .*{says}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path)


@given(st.data())
def test_a_file_that_is_cut_off_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = SMALL.SerializeToString()
    length = data.draw(st.integers(1, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / "m.onnx"
    path.write_bytes(whole[:length])
    with pytest.raises(ModelError, match="not an ONNX model"):
        load(path)


def test_external_data_stay_where_they_are(tmp_path: Path) -> None:
    loaded = load(external(model(), tmp_path))
    assert {tensor.name for tensor in external_tensors(loaded)} >= {"w", "v"}
    assert len(list(external_tensors(loaded))) == 5  # all but the one that is not stored as bytes
    tensors = {tensor.name: tensor for tensor in loaded.graph.initializer}
    np.testing.assert_array_equal(to_array(tensors["w"], tmp_path), W)
    brought_in = inlined(tensors["w"], tmp_path)
    assert brought_in == numpy_helper.from_array(W, "w")
    assert inlined(brought_in, Path("nowhere")) is brought_in
    assert tensors["w"].data_location == TensorProto.EXTERNAL
    assert not tensors["w"].HasField("raw_data")


def test_missing_external_data_are_named(tmp_path: Path) -> None:
    path = external(model(), tmp_path)
    (tmp_path / "tensors.bin").unlink()
    with pytest.raises(
        ModelError, match=r"external\.onnx: tensor '.*' is in 'tensors\.bin', which is missing beside it"
    ):
        load(path)


def test_short_external_data_are_named(tmp_path: Path) -> None:
    path = external(SMALL, tmp_path)
    os.truncate(tmp_path / "tensors.bin", 5)
    with pytest.raises(ModelError, match="tensor 'w'"):
        to_array(load(path).graph.initializer[0], tmp_path)
    with pytest.raises(ModelError, match="tensor 'w'"):
        save(load(path), tmp_path / "out.onnx", tmp_path)


def test_bytes_are_those_of_all_files(tmp_path: Path) -> None:
    save(SMALL, tmp_path / "m.onnx", tmp_path)
    assert file_bytes(tmp_path / "m.onnx") == (tmp_path / "m.onnx").stat().st_size
    path = external(SMALL, tmp_path)
    assert file_bytes(str(path)) == path.stat().st_size + (tmp_path / "tensors.bin").stat().st_size


# Writing


def test_external_data_are_brought_in(tmp_path: Path) -> None:
    path = external(model(), tmp_path)
    target = tmp_path / "other" / "m.onnx"
    target.parent.mkdir()
    save(load(path), target, tmp_path)
    assert os.listdir(target.parent) == ["m.onnx"]
    assert not list(external_tensors(load(target)))
    for got, want in zip(outputs(target), outputs(model()), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("before", ["inside", "external"])
def test_large_models_get_a_data_file(before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelfile, "SINGLE_FILE_LIMIT", 1000)
    source = load(external(model(), tmp_path)) if before == "external" else model()
    target = tmp_path / "other" / "m.onnx"
    target.parent.mkdir()
    save(source, target, tmp_path)
    assert sorted(os.listdir(target.parent)) == ["m.onnx", "m.onnx.data"]
    written = load(target)
    held = {tensor.name for tensor in external_tensors(written)}
    sizes = [len(tensor.raw_data) for tensor in modelfile._tensors(written)]
    assert max(sizes) <= 1024
    assert len(list(external_tensors(written))) == 2, held
    assert file_bytes(target) >= 2 * BIG.nbytes
    onnx.checker.check_model(target, full_check=True)
    for got, want in zip(outputs(target), outputs(model()), strict=True):
        np.testing.assert_array_equal(got, want)

    whole = onnx.load(target)  # onnx itself reads the same tensors
    stored = [tensor for node in whole.functions[0].node for a in node.attribute for tensor in [a.t] if a.HasField("t")]
    np.testing.assert_array_equal(numpy_helper.to_array(stored[0]), BIG)


def test_a_data_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelfile, "SINGLE_FILE_LIMIT", 1000)
    save(model(), tmp_path / "m.onnx", tmp_path)
    monkeypatch.undo()
    save(load(tmp_path / "m.onnx"), tmp_path / "single.onnx", tmp_path)
    assert load(tmp_path / "single.onnx") == model()


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("limit", [2**31, 0])
def test_a_full_disk_is_an_error_of_one_line(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelfile, "SINGLE_FILE_LIMIT", limit)
    monkeypatch.setattr(os, "fsync", no_space)
    message = r"m\.onnx: cannot be written \(No space left on device\); free space or choose another folder"
    with pytest.raises(InputError, match=message), whole_or_nothing(tmp_path / "m.onnx") as draft:
        save(model(), draft, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.onnx: cannot be written"):
        save(model(), tmp_path / "missing" / "m.onnx", tmp_path)


# Whole or nothing


def test_the_name_is_given_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelfile, "SINGLE_FILE_LIMIT", 1000)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the file before")
    with whole_or_nothing(path) as draft:
        save(model(), draft, tmp_path)
        assert path.read_bytes() == b"the file before"
        np.testing.assert_array_equal(outputs(draft), outputs(model()))  # it can be tried before it has its name
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    np.testing.assert_array_equal(outputs(path), outputs(model()))


def write_and_raise(draft: Path, error: type[BaseException]) -> None:
    draft.write_bytes(b"model")
    draft.with_name(draft.name + ".data").write_bytes(b"data")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_is_left_behind(error: type[BaseException], existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if existing:
        path.write_bytes(b"the file before")
    with pytest.raises(error), whole_or_nothing(path) as draft:
        write_and_raise(draft, error)
    assert os.listdir(tmp_path) == (["m.onnx"] if existing else [])
    assert not existing or path.read_bytes() == b"the file before"


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(b"model")
    (tmp_path / "folder").mkdir()
    for path, says in {
        tmp_path / "missing" / "m.onnx": "does not exist; make it first",
        tmp_path / "folder": "is a folder; give the name of a file",
        tmp_path / "folder" / ".." / "in.onnx": "is the input itself, which is never changed",
    }.items():
        with pytest.raises(InputError, match=says):
            check_output(path, source)
    check_output(tmp_path / "m.onnx", source)
    check_output(source, tmp_path / "m.onnx")  # an older output may be replaced


def test_a_folder_that_takes_no_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InputError, match="cannot be written; choose another one"):
        check_output(tmp_path / "m.onnx", tmp_path / "in.onnx")


@pytest.mark.parametrize("folder", ["", "missing"])
def test_without_a_hidden_folder_nothing_begins(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not folder:
        monkeypatch.setattr(os, "mkdir", no_space)
    with pytest.raises(InputError, match=r"m\.onnx: cannot be written"), whole_or_nothing(tmp_path / folder / "m.onnx"):
        pytest.fail("the block must not begin")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fails", ["m.onnx", "m.onnx.data"])
def test_a_move_that_fails_leaves_nothing(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def fail_once(source: Path, target: Path) -> None:
        if Path(target).name == fails:
            no_space()
        replace(source, target)

    monkeypatch.setattr(modelfile, "SINGLE_FILE_LIMIT", 1000)
    monkeypatch.setattr(os, "replace", fail_once)
    with (
        pytest.raises(InputError, match=r"m\.onnx: cannot be written"),
        whole_or_nothing(tmp_path / "m.onnx") as draft,
    ):
        save(model(), draft, tmp_path)
    assert os.listdir(tmp_path) == []


# Element types


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_bfloat16_is_rounded_to_even(values: list[float]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="onnx brings it since 1.19")
    array = np.array(values, np.float32)
    tensor = make_tensor(array, TensorProto.BFLOAT16, "t")
    with np.errstate(over="ignore"):
        want = array.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.frombuffer(tensor.raw_data, np.uint16), want.view(np.uint16))


def test_bfloat16_examples() -> None:
    array = np.array([[1, -2.5, 0], [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20)]], np.float32)
    tensor = make_tensor(array, TensorProto.BFLOAT16, "t")
    assert (tensor.name, tensor.data_type, list(tensor.dims)) == ("t", TensorProto.BFLOAT16, [2, 3])
    onnx.checker.check_tensor(tensor)
    want = [[1, -2.5, 0], [1, 1 + 2**-6, -(1 + 2**-7)]]
    np.testing.assert_array_equal(to_array(tensor, Path()).astype(np.float32), want)


@pytest.mark.parametrize(("elem_type", "dtype"), [("FLOAT", "f4"), ("FLOAT16", "f2"), ("DOUBLE", "f8")])
def test_other_types_are_those_of_numpy(elem_type: str, dtype: str) -> None:
    tensor = make_tensor(W, getattr(TensorProto, elem_type), "t")
    array = to_array(tensor, Path())
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array, W)


# Above 2 GB


@pytest.mark.slow
def test_models_above_two_gigabytes(tmp_path: Path) -> None:
    """Two tables that stay as they are, read from holes in a file, and one weight that is compressed."""
    rows, cols = 2**19 + 2**17, 512  # 1.25 GiB each
    graph = """(int64[2] i) => (float[2, 4] y) {
      a = Gather (first, i)
      b = Gather (second, i)
      h = Add (a, b)
      y = Gemm (h, w)
    }"""
    weight = numbers((cols, 4), 1)
    source = parse(graph, w=weight)
    for number, name in enumerate(("first", "second")):
        tensor = source.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=(rows, cols))
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = number * rows * cols * 4, rows * cols * 4
        for key, value in {"location": "tables.bin", "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
    rng = np.random.default_rng(0)
    last = (rng.integers(-2, 3, (2, cols)) / 2).astype(np.float32)
    with (tmp_path / "tables.bin").open("wb") as file:
        for number, row in enumerate(last, start=1):
            file.seek((number * rows - 1) * cols * 4)
            file.write(row.tobytes())
    (tmp_path / "m.onnx").write_bytes(source.SerializeToString())

    big = load(tmp_path / "m.onnx")
    (site,) = find(big, tmp_path).sites
    view = site.view("ihw")
    matrix = view.matrix(site.read())
    values, codes = np.unique(matrix, return_inverse=True)
    place(big, [Placement(site, Coded.one_stage(codes.reshape(matrix.shape), values[:, None]), view)], "hybrid")
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    with whole_or_nothing(target) as draft:
        save(big, draft, tmp_path)

    assert sorted(os.listdir(target.parent)) == ["m.onnx", "m.onnx.data"]
    assert target.stat().st_size < 10_000
    assert 2**31 < 2 * rows * cols * 4 <= file_bytes(target) < 2 * rows * cols * 4 + 20_000
    indices = {"i": np.array([0, rows - 1])}
    (got,) = run(open_session(target), indices).values()
    np.testing.assert_array_equal(got, np.stack([np.zeros(4, np.float32), (last[0] + last[1]) @ weight]))


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is a device or pipe"):
        modelfile.check_output(pipe, tmp_path / "in.onnx")
    assert pipe.is_fifo()


def test_files_that_are_read_are_no_output(tmp_path: Path) -> None:
    onnx.save(
        parse("(float[2, 24] x) => (float[R, C] y) { y = MatMul (x, w) }", w=BIG),
        tmp_path / "in.onnx",
        save_as_external_data=True,
        location="out.onnx.data",
        size_threshold=64,
    )
    (tmp_path / "images.npz").write_bytes(b"images")
    for name in ("out.onnx.data", "out.onnx"):  # the latter's own weights would go to the former
        with pytest.raises(InputError, match=r"out\.onnx\.data: holds weights of the input, which is never changed"):
            check_output(tmp_path / name, tmp_path / "in.onnx")
    check_output(tmp_path / "images.npz", tmp_path / "in.onnx", None, tmp_path / "nowhere.npz")
    with pytest.raises(InputError, match=r"images\.npz: is read as input, which is never changed"):
        check_output(tmp_path / "images.npz", tmp_path / "in.onnx", None, tmp_path / "images.npz")
    check_output(tmp_path / "out.onnx.data", tmp_path / "images.npz")  # no model; that is said when it is read
