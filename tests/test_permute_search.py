"""The search for orders of channels, and the pass that uses them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from channels import text
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

import vqonnx
from vqonnx.calibrate import Walk
from vqonnx.cli import main
from vqonnx.errors import ModelError, OptionError, VerifyError
from vqonnx.generate import generate_feeds
from vqonnx.graph import find
from vqonnx.method import Layer
from vqonnx.methods import PQ, Refined
from vqonnx.modelfile import load, save
from vqonnx.permute import Blocks, Group, apply, best_permutations, find_groups, prove
from vqonnx.permute.swaps import Consumer, _State, search
from vqonnx.permute.use import blocks_of_plan
from vqonnx.place import Target
from vqonnx.record import read_record
from vqonnx.runtime import open_session, run

HERE = Path()

# The search


def correlated(rng: np.random.Generator, rows: int, size: int) -> NDArray[np.float64]:
    """Weights whose channels come in groups of four that go together, in no order."""
    mixed = rng.standard_normal((rows, size // 4, 4))
    mixed = 0.9 * mixed.mean(axis=2, keepdims=True) * 2 + 0.3 * mixed
    return mixed.reshape(rows, size)[:, rng.permutation(size)]


def consumer(weights: NDArray[np.float64], width: int, weight: float = 1.0) -> Consumer:
    size = weights.shape[1]
    return Consumer((weights.T @ weights,), np.arange(size)[:, None], width, weight)


def log_det(weights: NDArray[np.float64], width: int) -> float:
    """What the search lowers, from the block vectors themselves."""
    vectors = weights.reshape(-1, width)
    return float(np.linalg.slogdet(vectors.T @ vectors / np.sum(vectors**2))[1])


@given(seed=st.integers(0, 2**16), width=st.sampled_from([2, 4, 8]))
def test_the_search_lowers_the_determinant_and_says_by_how_much(seed: int, width: int) -> None:
    weights = correlated(np.random.default_rng(seed), 40, 16)
    found = search([consumer(weights, width)], 16, swaps=500, seed=seed)
    assert sorted(found.order) == list(range(16))
    assert found.after <= found.before
    np.testing.assert_allclose(found.before, log_det(weights, width), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.after, log_det(weights[:, found.order], width), rtol=1e-3, atol=1e-3)


def test_the_search_finds_channels_that_belong_together() -> None:
    weights = correlated(np.random.default_rng(0), 400, 64)
    found = search([consumer(weights, 4)], 64, seed=0)
    assert found.after < found.before - 1.0, "1 of 4 weights in nats: some 1 dB"


@given(seed=st.integers(0, 2**16), run=st.sampled_from([1, 3]))
def test_swaps_are_tried_together_as_one_by_one(seed: int, run: int) -> None:
    """Blocks that are not whole, layers that read runs, and matrices of inputs beside those of weights."""
    rng = np.random.default_rng(seed)
    size, start = 10, int(rng.integers(0, 3))
    total = start + size * run + int(rng.integers(0, 4))
    grams = tuple(a.T @ a for a in (rng.standard_normal((30, total)) for _ in range(2)))
    entries = start + np.arange(size)[:, None] * run + np.arange(run)
    state = _State(Consumer(grams, entries, 4, 0.7), np.arange(size))
    pairs = np.stack([rng.permutation(size)[:2] for _ in range(12)])
    values = state.try_swaps(pairs)
    for (one, other), value in zip(pairs.tolist(), values, strict=True):
        assert state.try_swap(one, other) == pytest.approx(value, rel=1e-9, abs=1e-9)
        order = np.arange(size)
        order[[one, other]] = order[[other, one]]
        assert _State(Consumer(grams, entries, 4, 0.7), order).value == pytest.approx(value, rel=1e-6, abs=1e-6)
    state.try_swap(*pairs[0].tolist())
    state.accept()
    assert state.value == pytest.approx(values[0], rel=1e-9, abs=1e-9)


@given(seed=st.integers(0, 2**16))
def test_same_seed_same_order(seed: int) -> None:
    weights = correlated(np.random.default_rng(seed), 40, 16)
    one, other = (search([consumer(weights, 4)], 16, swaps=300, seed=seed) for _ in range(2))
    np.testing.assert_array_equal(one.order, other.order)


def test_ten_thousand_swaps_of_512_channels_take_seconds() -> None:
    weights = correlated(np.random.default_rng(0), 100, 512)
    start = time.process_time()
    search([consumer(weights, 8)], 512, swaps=10_000)
    assert time.process_time() - start < 10


def wide(seed: int = 0, size: int = 64) -> ModelProto:
    """Layers of one tap whose inputs go together in fours, in no order; and one of nine taps."""
    rng = np.random.default_rng(seed)
    model = text(
        """a = Conv (x, w1)  b = Relu (a)  c = Conv (b, w2)  d = Relu (c)  e = Conv <pads = [1, 1, 1, 1]> (d, w3)
        g = GlobalAveragePool (e)  f = Flatten (g)  y = Gemm <transB = 1> (f, w4)""",
        w1=(size, 3, 1, 1),
    )
    for name, shape in {"w2": (size, size, 1, 1), "w3": (size, size, 3, 3), "w4": (40, size)}.items():
        flat = correlated(rng, int(np.prod(shape) // size), size)
        if len(shape) == 4:
            flat = flat.reshape(shape[0], *shape[2:], size).transpose(0, 3, 1, 2)
        values = (flat / np.sqrt(size * np.prod(shape[2:]))).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return model


def feeds(count: int = 3) -> list[dict[str, NDArray[np.float32]]]:
    return [{"x": np.random.default_rng(n).standard_normal((8, 3, 4, 4)).astype(np.float32)} for n in range(count)]


def test_an_order_that_is_used_lowers_the_measured_error() -> None:
    model = wide()
    found = best_permutations(model, HERE, None, 4, seed=1, bits=5)
    assert [list(each.gains_db) for each in found] == [["w2"], ["w4"]], "nine taps are whole blocks or none"
    for each in found:
        assert each.proxy_after < each.proxy_before
        (name,) = each.gains_db
        errors = []
        twin = ModelProto()
        twin.CopyFrom(model)
        apply(twin, each.group, each.order, HERE)
        for one in (model, twin):
            site = next(site for site in find(one, HERE).sites if site.name == name)
            matrix = site.view("ihw").matrix(site.read())
            form = PQ(width=4, bits=5).encode(Layer(name, site.op_type, matrix, site.kernel, seed=5))
            errors.append(float(np.sum((matrix - form.decode()) ** 2)))
        assert errors[1] < errors[0]
        assert 0.3 < 10 * np.log10(errors[0] / errors[1]) < 12


def test_with_channels_innermost_kernels_count_too() -> None:
    found = best_permutations(wide(), HERE, None, 4, order="hwi")
    assert [list(each.gains_db) for each in found] == [["w2"], ["w3"], ["w4"]]
    assert best_permutations(wide(), HERE, None, 1) == []


def test_moments_change_what_is_measured() -> None:
    model = wide()
    sites = find(model, HERE).sites
    with Walk(model, HERE, sites, feeds()) as walk:
        moments = {site.name: walk.observe(site, "ihw") for site in sites}
    found = best_permutations(model, HERE, moments, 4, seed=1)
    again = best_permutations(model, HERE, moments, 4, seed=1)
    assert [each.order.tolist() for each in found] == [each.order.tolist() for each in again]
    assert found
    assert all(sum(each.gains_db.values()) > 0 for each in found)


# The pass


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("permute") / "wide.onnx"
    onnx.save(wide(), path)
    return path


@pytest.mark.parametrize("target", ["hybrid", "portable", "custom"])
def test_a_permuted_and_compressed_model_verifies(target: Target, source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    methods = [vqonnx.PQ(width=4, bits=6), Refined(width=4, bits=6)]
    for method, calibration in zip(methods, [None, feeds()], strict=True):
        plain = vqonnx.compress(source, method, calibration=calibration, target=target)
        result = vqonnx.compress(source, method, calibration=calibration, target=target, permute=True)
        saved = result.save(tmp_path / f"{method.id}.onnx")
        assert saved.comparison is not None
        assert saved.comparison.snr_db is not None
        assert saved.comparison.snr_db > {"pq": 1, "refined": 15}[method.id]
        assert [layer.bytes for layer in result.layers] == [layer.bytes for layer in plain.layers]
        pairs = zip(plain.layers, result.layers, strict=True)
        gains = {b.name: (b.weight_snr_db or 0) - (a.weight_snr_db or 0) for a, b in pairs}
        assert 2 < gains["w2"] < 9, gains
        assert 2 < gains["w4"] < 9, gains
        assert abs(gains["w3"]) < 0.3, "nine taps, in whole blocks or none"
        record = read_record(load(saved.path))
        assert record is not None
        assert record.permuted == 2
    assert source.read_bytes() == before, "the input file is not touched"


def test_same_seed_same_bytes(source: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.onnx", "two.onnx", "other.onnx")]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        method = Refined(width=4, bits=5)
        vqonnx.compress(source, method, calibration=feeds(), permute=True, seed=seed).save(path, verify=False)
    one, two, other = (path.read_bytes() for path in paths)
    assert one == two != other


def test_without_it_nothing_changes(source: Path, tmp_path: Path) -> None:
    for name, options in {"plain": {}, "off": {"permute": False}}.items():
        vqonnx.compress(source, vqonnx.PQ(width=4, bits=5), **options).save(tmp_path / name, verify=False)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "off").read_bytes()
    record = read_record(load(tmp_path / "off"))
    assert record is not None
    assert record.permuted == 0


def test_a_model_that_stays_as_it_is_keeps_its_order(source: Path, tmp_path: Path) -> None:
    method = vqonnx.PQ(width=2, bits=12, codebook="float32")  # as many words as vectors
    result = vqonnx.compress(source, method, include=["w4"], permute=True, allow_unchanged=True)
    assert not result.layers
    assert result.model == load(source)


def test_methods_without_blocks_are_refused(source: Path) -> None:
    for method in (vqonnx.KMeans(bits=4), vqonnx.PQ(width=4, bits=4, along="outputs")):
        with pytest.raises(OptionError, match=f"method '{method.id}' has no blocks of inputs") as caught:
            vqonnx.compress(source, method, permute=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match=r"method 'best' has no blocks .* best with codes of one length"):
        vqonnx.compress(source, vqonnx.Best(codes="prefix"), calibration=feeds(), permute=True)
    with pytest.raises(OptionError, match="exclude each other"):
        vqonnx.compress(source, vqonnx.PQ(), permute=True, tune=lambda site, view, form: form)


def test_best_has_blocks_of_its_own_choice(source: Path) -> None:
    for method in (vqonnx.Best(), vqonnx.Best(bits=3)):  # bits are an average over the layers
        blocks = blocks_of_plan([(site, method) for site in find(load(source), source.parent).sites])
        assert set(blocks.values()) == {Blocks(4, 6, "ihw")}


def test_a_change_of_the_outputs_is_an_error(source: Path) -> None:
    model = load(source)
    group = find_groups(model, source.parent).groups[0]
    broken = Group(group.size, group.producers, group.consumers, group.constants[:1])
    apply(model, broken, np.random.default_rng(0).permutation(group.size), source.parent)
    with pytest.raises(VerifyError, match=r"'y' changed by .* dB \(at least 60 expected\)") as caught:
        prove(source, model, feeds())
    assert "\n" not in str(caught.value)


def test_distilling_what_was_permuted_is_refused(source: Path, tmp_path: Path) -> None:
    from vqonnx.training.distill import distill

    path = tmp_path / "small.onnx"
    vqonnx.compress(source, vqonnx.PQ(width=4, bits=5), permute=True).save(path)
    with pytest.raises(ModelError, match="2 groups of channels lie in another order than in wide") as caught:
        distill(source, path, feeds())
    assert "\n" not in str(caught.value)


def test_the_command_line_has_it(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.onnx"
    assert main(["compress", str(source), str(path), "--method", "pq", "--width", "4", "--permute", "--quiet"]) == 0
    record = read_record(load(path))
    assert record is not None
    assert record.permuted == 2
    assert main(["compress", str(source), str(path), "--method", "kmeans", "--permute"]) != 0
    assert "method 'kmeans' has no blocks of inputs" in capsys.readouterr().err


def test_a_real_network_gains(data_dir: Path, tmp_path: Path) -> None:
    """One layer of SqueezeNet that reads the first pooling: 2 dB and more by the order of its inputs alone."""
    path = data_dir / "models" / "squeezenet.onnx"
    model = load(path)
    found = best_permutations(model, path.parent, None, 4)
    gains = {name: gain for each in found for name, gain in each.gains_db.items()}
    assert 1.0 < gains["fire2/squeeze1x1_w_0"] < 8.0
    feed = dict(generate_feeds(path, seed=0)[0])
    expected = run(open_session(path), feed)
    for each in found:
        apply(model, each.group, each.order, path.parent)
    save(model, tmp_path / "twin.onnx", path.parent)
    for key, value in run(open_session(tmp_path / "twin.onnx"), feed).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-6)
