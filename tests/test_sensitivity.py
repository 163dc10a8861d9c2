"""How far the outputs move when one weight does: exact on small linear models, and what counts as an output."""

from __future__ import annotations

from pathlib import Path

import cases
import nets
import numpy as np
import onnx
import pytest
from onnx import ModelProto

from vqonnx import modelfile
from vqonnx.graph import find
from vqonnx.sensitivity import Probe, noisy

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def parse(body: str, outputs: str = "float[N, 4] y") -> ModelProto:
    return cases.parse(f"(float[N, 6] x) => ({outputs}) {{ {body} }}", w=nets.draw((6, 4), 1), v=nets.draw((4, 4), 2))


def effect(model: ModelProto, name: str, feeds: list[dict[str, np.ndarray]] | None = None) -> float | None:
    """Of noise on the weight ``name``."""
    sites = {site.name: site for site in find(model, ".").sites}
    matrix = sites[name].view("ihw").matrix(sites[name].read())
    before = model.SerializeToString()
    found = Probe(model, Path(), feeds or [{"x": X}]).effect(sites[name], noisy(matrix, 3))
    assert model.SerializeToString() == before, "the model was changed"
    return found


def relative(after: np.ndarray, before: np.ndarray) -> float:
    return float(np.sum((after - before) ** 2) / np.sum(before**2))


def shaken(seed: int, shape: tuple[int, int]) -> np.ndarray:
    return noisy(nets.draw(shape, seed).T.copy(), 3).T


def test_noise_has_a_hundredth_of_each_rows_energy() -> None:
    matrix = nets.draw((4, 5000), 0) * np.array([[1], [10], [0], [0.1]], np.float32)
    lost = np.sum((noisy(matrix, 1) - matrix) ** 2, axis=1)
    np.testing.assert_allclose(lost, 0.01 * np.sum(matrix**2, axis=1), rtol=0.1)
    np.testing.assert_array_equal(noisy(matrix, 1), noisy(matrix, 1))
    assert (noisy(matrix, 2) != noisy(matrix, 1))[0].all()


@pytest.mark.parametrize("groups", [1, 2])
def test_noise_leaves_the_mean_of_the_output_where_it_was(groups: int) -> None:
    matrix, means = nets.draw((6, 40), 0), np.abs(nets.draw((groups, 40), 1)).astype(np.float64)
    white, noise = (noisy(matrix, 1, at).astype(np.float64) - matrix for at in (None, 3 * means))
    moved, before = (
        np.concatenate([part @ mean for part, mean in zip(np.split(by, groups), means, strict=True)])
        for by in (noise, white)
    )
    assert np.abs(moved).max() < 1e-3 * np.abs(before).max()
    assert 0.8 < np.sum(noise**2) / np.sum(white**2) < 1  # nothing else is taken from it
    np.testing.assert_array_equal(noisy(matrix, 1, 0 * means), noisy(matrix, 1))


def test_the_effect_is_the_relative_change_of_the_output() -> None:
    model = parse("h = MatMul (x, w)  y = MatMul (h, v)")
    w, v = nets.draw((6, 4), 1), nets.draw((4, 4), 2)
    assert effect(model, "w") == pytest.approx(relative(X @ shaken(1, (6, 4)) @ v, X @ w @ v), rel=1e-4)
    assert effect(model, "v") == pytest.approx(relative(X @ w @ shaken(2, (4, 4)), X @ w @ v), rel=1e-4)
    several = [{"x": X[:3]}, {"x": X[3:]}]
    assert effect(model, "w", several) == pytest.approx(effect(model, "w"), rel=1e-4)


def test_each_output_counts_in_its_own_unit() -> None:
    model = parse("h = MatMul (x, w)  c = Constant <value = float {1000.0}> ()  y = Mul (h, c)", "float[N, 4] y")
    loud = parse("y = MatMul (x, w)  n = Neg (y)  z = Mul (n, n)", "float[N, 4] y, float[N, 4] z")
    single = parse("y = MatMul (x, w)")
    assert effect(model, "w") == pytest.approx(effect(single, "w"), rel=1e-4)
    w, moved = X @ nets.draw((6, 4), 1), X @ shaken(1, (6, 4))
    assert effect(loud, "w") == pytest.approx(relative(moved, w) + relative(moved**2, w**2), rel=1e-4)


def test_probabilities_are_looked_at_before_the_softmax() -> None:
    plain = parse("h = MatMul (x, w)  y = MatMul (h, v)")
    for operator in ("Softmax", "LogSoftmax"):
        final = parse(f"h = MatMul (x, w)  l = MatMul (h, v)  y = {operator} (l)")
        assert effect(final, "w") == pytest.approx(effect(plain, "w"), rel=1e-5)
    inside = parse("h = MatMul (x, w)  s = Softmax (h)  y = MatMul (s, v)")
    assert effect(inside, "w") < effect(plain, "w") / 2


def test_outputs_that_are_no_numbers_tell_nothing() -> None:
    model = parse("h = MatMul (x, w)  y = ArgMax (h)", "int64[A, B] y")
    assert effect(model, "w") is None
    both = parse("h = MatMul (x, w)  y = MatMul (h, v)  z = ArgMax (y)", "float[N, 4] y, int64[A, B] z")
    assert effect(both, "w") == pytest.approx(effect(parse("h = MatMul (x, w)  y = MatMul (h, v)"), "w"), rel=1e-5)


def test_a_weight_that_the_output_does_not_see_has_no_effect() -> None:
    assert effect(parse("a = MatMul (x, w)  b = Mul (a, a)  z = Sub (b, b)  h = Gemm (z, v)  y = Add (h, h)"), "w") in (
        0.0,
        None,
    )


def test_a_weight_in_a_branch_has_an_effect() -> None:
    model = nets.branches()
    sites = find(model, ".").sites
    probe = Probe(model, Path(), nets.feeds_of("branches"))
    found = []
    for site in sites:
        found.append(probe.effect(site, noisy(site.view("ihw").matrix(site.read()), 1)))
    assert any(value is not None and value > 1e-4 for value in found), found


def test_only_as_many_images_are_run_as_are_worth_it() -> None:
    model = parse("y = MatMul (x, w)")
    taken = []

    def feeds():
        for number in range(100):
            taken.append(number)
            yield {"x": X}

    Probe(model, Path(), feeds())
    assert len(taken) == 8  # of 8 images each


@pytest.mark.parametrize("limit", [None, 1000], ids=["in one file", "too large for one file"])
def test_external_data_come_along(limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.dense(2, 64)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    loaded = onnx.load(path, load_external_data=False)
    x = {entry.name: np.ones((2, 64), np.float32) for entry in loaded.graph.input}
    inner, site = (find(either, tmp_path).sites[0] for either in (model, loaded))
    expected = Probe(model, tmp_path, [x]).effect(inner, noisy(inner.view("ihw").matrix(inner.read()), 0))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    if limit is not None:
        monkeypatch.setattr(modelfile, "SINGLE_FILE_LIMIT", limit)
    found = Probe(loaded, tmp_path, [x]).effect(site, noisy(site.view("ihw").matrix(site.read()), 0))
    assert found is not None
    assert found > 0
    assert found == expected
    assert not list(scratch.iterdir())
