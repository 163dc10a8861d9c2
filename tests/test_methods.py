"""The checks that every method passes, and one of what each claims."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from math import prod
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vqonnx.errors import OptionError
from vqonnx.form import Blocks, Coded, Dense, Form, Product, code_bits, row_bytes
from vqonnx.method import Layer, LeftAlone, Method, Needs, blocks_of
from vqonnx.methods import METHODS, method_by_name
from vqonnx.methods.best import Best
from vqonnx.methods.bgd import BGD
from vqonnx.methods.binary import Binary
from vqonnx.methods.codebook import clamp_words, store
from vqonnx.methods.dqc import DQC, power_book, power_codes
from vqonnx.methods.entropy import Entropy
from vqonnx.methods.kmeans import KMeans
from vqonnx.methods.pq import PQ
from vqonnx.methods.refined import Refined
from vqonnx.methods.residual import Residual
from vqonnx.methods.svd import SVD
from vqonnx.methods.transform import Transform
from vqonnx.moments import FULL_COLS, Moments, MomentsAccumulator, snr_db

IDS = [kind.id for kind in METHODS]
every_method = pytest.mark.parametrize("kind", METHODS, ids=IDS)
RANDOM = ("kmeans", "pq", "bgd", "residual", "refined", "best")  # those that a seed can change


def having(option: str, *but: type[Method]) -> pytest.MarkDecorator:
    """Every method that has such an option, but these."""
    kinds = [kind for kind in METHODS if kind not in but and option in {field.name for field in fields(kind)}]
    assert kinds, option
    return pytest.mark.parametrize("kind", kinds, ids=[kind.id for kind in kinds])


def bits_of(kind: type[Method]) -> list[int]:
    hint = get_type_hints(kind)["bits"]
    if kind in (Entropy, Best):  # beyond 7 bits there are no more levels, at 1 hardly any
        return list(range(2, 8))
    return list(get_args(hint)) if get_origin(hint) is Literal else list(range(1, 9))


def correlated_rows(cols: int, seed: int, groups: int = 1, count: int = 400) -> NDArray[np.float32]:
    """Inputs like activations: neighbours move together, some columns are louder than others."""
    rng = np.random.default_rng(seed)
    common = np.cumsum(rng.normal(size=(groups, count, cols)), axis=2)
    return (common / np.sqrt(np.arange(1, cols + 1)) * rng.uniform(0.1, 3, cols)).astype(np.float32)


def moments_of(rows: NDArray[np.float32]) -> Moments:
    accumulator = MomentsAccumulator(rows.shape[0], rows.shape[2])
    accumulator.add(rows)
    return accumulator.result()


def gaussian(rows: int, cols: int, seed: int, kernel: tuple[int, ...] = (), **more: Any) -> Layer:
    weight = np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32) * 0.1
    op_type = "Conv" if kernel else "Gemm"
    return Layer(f"gaussian-{rows}x{cols}-{seed}", op_type, weight, kernel, seed=seed, **more)


def with_moments(layer: Layer, groups: int = 1) -> Layer:
    return replace(layer, moments=moments_of(correlated_rows(layer.weight.shape[1], layer.seed, groups)))


def seen(method: Method, layer: Layer) -> Layer:
    """The layer as a method sees it: some want the input channels as rows."""
    if method.view_order != "ohw":
        return layer
    taps = prod(layer.kernel)
    rows, cols = layer.weight.shape
    turned = layer.weight.reshape(rows, cols // taps, taps).transpose(1, 0, 2).reshape(cols // taps, rows * taps)
    return replace(layer, weight=np.ascontiguousarray(turned))


def spell(method: Method, layer: Layer) -> str:
    return f"{method} on {layer.name} {layer.weight.shape} kernel {layer.kernel} seed {layer.seed}"


def snr(layer: Layer, form: Form) -> float:
    found = snr_db(float(np.sum(layer.weight**2)), float(np.sum((layer.weight - form.decode()) ** 2)))
    return np.inf if found is None else found


def array_bytes(form: Form) -> bytes:
    if isinstance(form, Product):
        return array_bytes(form.left) + array_bytes(form.right)
    if isinstance(form, Dense):
        return form.values.tobytes()
    if isinstance(form, Blocks):
        return b"".join(array_bytes(part) for part in form.parts)
    assert isinstance(form, Coded)
    scales = b"" if form.scales is None else form.scales.tobytes()
    return form.packed.tobytes() + form.codebooks.tobytes() + scales


def few_values() -> Layer:
    values = np.array([-1.5, 0, 0.25], np.float32)  # exact in float16
    weight = np.tile(values, (60, 24))[:, : 24 * 3]
    return Layer("three-values", "Gemm", weight)


LAYERS = [
    gaussian(64, 72, 0, (3, 3)),
    with_moments(gaussian(64, 72, 1, (3, 3))),
    with_moments(gaussian(64, 72, 2, (3, 3)), groups=4),
    with_moments(gaussian(96, 64, 3)),
    with_moments(gaussian(1, 512, 4)),
    with_moments(gaussian(512, 1, 5)),
    with_moments(gaussian(1, 1, 6)),
    with_moments(gaussian(40, 37, 7)),  # 37 is prime: a tail shorter than a vector
    replace(with_moments(gaussian(64, 36, 8, (3, 3))), weight=np.zeros((64, 36), np.float32), name="all-zero"),
    replace(gaussian(50, 64, 9), moments=moments_of(np.zeros((1, 5, 64), np.float32)), name="dead-inputs"),
    few_values(),
    with_moments(few_values()),
    with_moments(gaussian(33, 45, 10, (3, 3), first=True)),
    with_moments(gaussian(30, 40, 11, (5,), last=True)),
]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.name}-{layer.moments is not None}")

# What is left alone at the default options: a width that is more than a row, too few vectors, the first layer.
LEFT_ALONE = {
    "kmeans": set(),
    "pq": {"gaussian-512x1-5", "gaussian-1x1-6"},
    "bgd": {"gaussian-512x1-5", "gaussian-1x1-6", "gaussian-33x45-10"},
    "residual": {"gaussian-512x1-5", "gaussian-1x1-6"},
    "transform": {"gaussian-1x1-6", "gaussian-1x512-4"},  # 4 bits a weight are less than a step for each row
    "entropy": {"gaussian-1x1-6"},  # 2 bits a weight are too few for this one
    "best": {"gaussian-512x1-5", "gaussian-1x1-6"},
    "svd": {"gaussian-512x1-5", "gaussian-1x1-6", "gaussian-1x512-4"},
}


# ---------------------------------------------------------------- every method, every layer


@every_method
@every_layer
def test_the_form_has_the_shape_of_the_weight(kind: type[Method], layer: Layer) -> None:
    method = kind()
    layer = seen(method, layer)
    if layer.name in LEFT_ALONE.get(kind.id, ()):
        with pytest.raises(LeftAlone, match=r"\w+ "):
            method.encode(layer)
        return
    before = layer.weight.copy()
    form = method.encode(layer)
    where = spell(method, layer)
    assert form.shape == layer.weight.shape, where
    decoded = form.decode()
    assert decoded.shape == layer.weight.shape, where
    assert np.isfinite(decoded).all(), where
    np.testing.assert_array_equal(layer.weight, before, err_msg=f"{where}: the weight was changed")
    if not layer.weight.any():
        assert not decoded.any(), where
    else:
        assert snr(layer, form) > 1.5, where  # where all inputs were zero, the weights hardly count


def encode(method: Method, layer: Layer) -> Form | str:
    """The form, or the reason why there is none."""
    try:
        return method.encode(layer)
    except LeftAlone as reason:
        return str(reason)


@every_method
@every_layer
def test_the_same_layer_gives_the_same_bytes(kind: type[Method], layer: Layer) -> None:
    layer = seen(kind(), layer)
    first, second = encode(kind(), layer), encode(kind(), replace(layer, weight=layer.weight.copy()))
    if isinstance(first, str) or isinstance(second, str):
        assert first == second, spell(kind(), layer)
    else:
        assert array_bytes(first) == array_bytes(second), spell(kind(), layer)


@every_method
def test_another_seed_gives_other_bytes_of_the_same_size(kind: type[Method]) -> None:
    layer = seen(kind(), with_moments(gaussian(96, 72, 0, (3, 3))))
    first, second = kind().encode(layer), kind().encode(replace(layer, seed=1))
    if kind.id not in RANDOM:
        assert array_bytes(first) == array_bytes(second)
        return
    assert array_bytes(first) != array_bytes(second)
    assert first.nbytes == second.nbytes
    assert abs(snr(layer, first) - snr(layer, second)) < 1.0


@having("bits")
def test_fewer_bits_take_fewer_bytes(kind: type[Method]) -> None:
    # 1280 blocks of 9: enough for 256 words by the paper's rule
    layer = seen(kind(), with_moments(gaussian(128, 90, 0, (3, 3))))
    sizes = [kind(bits=bits).encode(layer).nbytes for bits in bits_of(kind)]
    assert sizes == sorted(set(sizes)), f"{kind.id} on {layer.name}: {sizes}"
    assert sizes[-1] < layer.weight.nbytes / 2


@having("bits")
def test_more_bits_never_raise_the_error_on_average(kind: type[Method]) -> None:
    layers = [seen(kind(), with_moments(gaussian(64, 72, seed, (3, 3)))) for seed in range(3)]
    means = [np.mean([snr(layer, kind(bits=bits).encode(layer)) for layer in layers]) for bits in bits_of(kind)]
    assert means == sorted(means), f"{kind.id}: {means}"


@having("codebook", Best)
def test_float32_codebooks_cost_twice_and_are_no_worse(kind: type[Method]) -> None:
    layer = with_moments(gaussian(64, 72, 0, (3, 3)))
    half, single = kind(codebook="float16").encode(layer), kind(codebook="float32").encode(layer)
    assert isinstance(half, Coded)
    assert isinstance(single, Coded)
    assert single.nbytes - half.nbytes == half.codebooks.nbytes + (0 if half.scales is None else half.scales.nbytes)
    assert snr(layer, single) >= snr(layer, half) - 0.01


@pytest.mark.parametrize("scale", ["none", "row"])
def test_codebooks_of_whole_numbers_cost_half_and_lose_next_to_nothing(scale: Literal["none", "row"]) -> None:
    layer = with_moments(gaussian(64, 72, 0, (3, 3)))
    half = Refined(scale=scale).encode(layer)
    for size in (1.0, 1e-9, 1e9):  # the scale holds what float16 words cannot
        scaled = replace(layer, weight=layer.weight * np.float32(size))
        whole = Refined(scale=scale, codebook="int8").encode(scaled)
        assert whole.codebooks.dtype == np.int8
        assert whole.scales is not None
        assert whole.scales.shape == (1 if scale == "none" else 64, 1)
        assert whole.scales.dtype == (np.float16 if size == 1 else np.float32)
        assert snr(scaled, whole) > snr(layer, half) - (0.1 if size == 1 else 0.5)  # k-means ends elsewhere
        assert int(np.abs(whole.codebooks.astype(int)).max()) == 127
        if size == 1:
            assert half.nbytes - whole.nbytes == whole.codebooks.nbytes - (2 if scale == "none" else 0)


@pytest.mark.parametrize("scale", ["none", "row"])
def test_whole_numbers_of_weights_that_float32_hardly_holds(scale: Literal["none", "row"]) -> None:
    layer = with_moments(gaussian(64, 72, 0, (3, 3)))
    layer = replace(layer, weight=layer.weight * np.float32(3e-45))
    assert layer.weight.any()
    assert np.isfinite(Refined(scale=scale, codebook="int8").encode(layer).decode()).all()


@having("codebook", Best)
def test_weights_beyond_float16_are_left_alone_or_kept_in_float32(kind: type[Method]) -> None:
    layer = gaussian(64, 72, 0, (3, 3))
    layer = replace(layer, weight=layer.weight * 1e7)
    with pytest.raises(LeftAlone, match=r"float16 \(65504\).*codebook=float32"):
        kind().encode(layer)
    assert np.isfinite(kind(codebook="float32").encode(layer).decode()).all()


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    bits=st.integers(0, 7),
    width=st.integers(1, 12),
    seed=st.integers(0, 99),
    observed=st.booleans(),
)
@pytest.mark.parametrize("kind", METHODS, ids=IDS)
def test_any_shape_bits_and_width(
    kind: type[Method], rows: int, cols: int, bits: int, width: int, seed: int, observed: bool
) -> None:
    layer = gaussian(rows, cols, seed)
    layer = with_moments(layer) if observed else layer
    known = {field.name for field in fields(kind)}
    options = {"width": width} if "width" in known else {}
    if "bits" in known:
        bits = bits_of(kind)[bits % len(bits_of(kind))]
        options["bits"] = bits
    method = kind(**options)
    layer = seen(method, layer)
    where = spell(method, layer)
    form = encode(method, layer)
    if isinstance(form, str):
        assert form, where
        if kind in (Transform, Entropy, Best):
            assert "set bits=" in form, where
            return
        if kind is SVD:
            assert 2 * (rows + cols) > 2 * rows * cols, where
            return
        assert "width" in options, where  # scalar codes exist for every layer
        vectors = rows * -(-cols // width)
        assert cols < width or (kind is BGD and clamp_words(2**bits, vectors) < 2), where
        return
    assert form.shape == layer.weight.shape, where
    assert np.isfinite(form.decode()).all(), where
    if not isinstance(form, Coded):
        return
    if kind is Best:  # it chooses bits and width
        assert 8 * form.nbytes <= options.get("bits", 2.5) * rows * cols, where
        return
    if form.coding is not None:  # its codes differ in length; layers share trees and codebook
        own = form.nbytes - form.coding.trees.nbytes - form.codebooks.nbytes
        assert 8 * own <= bits * rows * cols, where
        return
    assert form.bits <= options.get("bits", 1), where
    assert form.width == options.get("width", 1), where


@pytest.mark.parametrize("layer", [few_values(), with_moments(few_values())], ids=["plain", "observed"])
@pytest.mark.parametrize(
    "method",
    [KMeans(bits=2), PQ(width=3), PQ(width=4), PQ(width=5, books="group"), Residual(width=4), Residual(width=None)],
    ids=str,
)
def test_fewer_distinct_vectors_than_words_are_exact(method: Method, layer: Layer) -> None:
    form = method.encode(layer)
    assert isinstance(form, Coded)
    assert form.decode().tobytes() == layer.weight.tobytes(), spell(method, layer)
    assert form.words <= 5, spell(method, layer)


# ---------------------------------------------------------------- options


def alternatives(kind: type[Method]) -> list[dict[str, Any]]:
    """Each option at each of a few values, found from the fields."""
    hints = get_type_hints(kind)
    found: list[dict[str, Any]] = [{}]
    for field in fields(kind):
        hint = hints[field.name]
        if kind is Transform and field.name == "order":
            values: list[Any] = ["ihw"]  # its axis says what others say by the order
        elif get_origin(hint) is Literal:
            values = list(get_args(hint))
        elif hint is bool:
            values = [False, True]
        elif hint is float:
            values = [0.25, 0.75]
        else:
            values = [1, 3, 8] + ([None] if type(None) in get_args(hint) else [])
        found += [{field.name: value} for value in values]
    return found


@every_method
def test_options_survive_as_text(kind: type[Method]) -> None:
    for options in alternatives(kind):
        method = kind(**options)
        assert set(method.options) == {field.name for field in fields(kind)}
        assert method_by_name(kind.id, {name: str(value) for name, value in method.options.items()}) == method
        assert method_by_name(kind.id, method.options) == method, "as read from JSON"


@every_method
def test_defaults_need_no_option(kind: type[Method]) -> None:
    assert method_by_name(kind.id) == kind()


@every_method
def test_an_unknown_option_is_named_with_those_there_are(kind: type[Method]) -> None:
    with pytest.raises(OptionError, match=rf"'{kind.id}' has no option 'color'; it has order, \w+"):
        method_by_name(kind.id, {"color": "red"})


def bad_values() -> list[Any]:
    cases = []
    for kind in METHODS:
        hints = get_type_hints(kind)
        for field in fields(kind):
            hint = hints[field.name]
            if get_origin(hint) is Literal:
                bad = ["", "x", "None"]
            elif hint is bool:
                bad = ["2", "maybe", ""]
            else:
                bad = ["x", "", "0", "-1", "99999", *([] if hint in (float, float | None) else ["4.5"])]
            cases += [pytest.param(kind, field.name, value, id=f"{kind.id}-{field.name}-{value}") for value in bad]
    return cases


@pytest.mark.parametrize(("kind", "name", "value"), bad_values())
def test_a_bad_value_is_named(kind: type[Method], name: str, value: str) -> None:
    with pytest.raises(OptionError) as error:
        method_by_name(kind.id, {name: value})
    message = str(error.value)
    assert kind.id in message, message
    assert name in message, message
    assert value in message, message


@pytest.mark.parametrize(
    ("name", "option", "value", "nearest"),
    [
        ("kmeans", "bits", 0, "1 to"),
        ("kmeans", "bits", 17, "to 8"),
        ("pq", "bits", 17, "to 12"),
        ("pq", "width", 0, "1 to"),
        ("pq", "width", 65, "to 64"),
        ("residual", "stages", 0, "1 to"),
        ("residual", "stages", 9, "to 8"),
        ("residual", "bits", 9, "to 8"),
        ("binary", "planes", 0, "1 to"),
        ("binary", "planes", 9, "to 8"),
        ("svd", "rank", 0, "1 to"),
        ("svd", "rank", -3, "1 to"),
    ],
)
def test_out_of_range_names_the_nearest_that_works(name: str, option: str, value: int, nearest: str) -> None:
    with pytest.raises(OptionError, match=rf"^method '{name}': {option} is {value}; choose .*{nearest}") as error:
        method_by_name(name, {option: value})
    closest = next(int(part) for part in nearest.split() if part != "to")
    assert getattr(method_by_name(name, {option: closest}), option) == closest, str(error.value)


@pytest.mark.parametrize("value", ["auto", "None", "none"])
def test_no_width_may_be_written_in_words(value: str) -> None:
    assert method_by_name("bgd", {"width": value}) == BGD(width=None)


def test_an_unknown_method_is_named_with_those_there_are() -> None:
    with pytest.raises(OptionError, match=f"'qp' is unknown.*{', '.join(IDS)}"):
        method_by_name("qp")


def test_ids_are_different() -> None:
    assert len(set(IDS)) == len(METHODS)


@having("along")
def test_vectors_along_outputs_are_rows_of_inputs(kind: type[Method]) -> None:
    assert (kind().view_order, kind(order="hwi").view_order) == ("ihw", "hwi")
    assert kind(along="outputs").view_order == "ohw"
    with pytest.raises(OptionError, match=rf"'{kind.id}': order=hwi needs along=inputs"):
        kind(along="outputs", order="hwi")


# ---------------------------------------------------------------- what the helpers claim


@pytest.mark.parametrize(
    ("words", "vectors", "expected"),
    [
        (256, 64 * 64 // 8, 64),  # the rule of the released code: 64x64x1x1 with d=8
        (256, 513, 128),  # strictly smaller than a quarter
        (256, 1024, 128),
        (256, 1025, 256),
        (16, 10**6, 16),
        (256, 9, 2),
        (256, 8, 1),
        (256, 1, 1),
        (2, 10**6, 2),
    ],
)
def test_clamp_words(words: int, vectors: int, expected: int) -> None:
    assert clamp_words(words, vectors) == expected


@given(st.integers(1, 12), st.integers(1, 50_000))
def test_clamp_words_is_the_largest_power_of_two_below_a_quarter(bits: int, vectors: int) -> None:
    powers = [2**power for power in range(bits + 1) if 2**power < vectors / 4]
    assert clamp_words(2**bits, vectors) == max(powers, default=1)


def test_blocks_of_fills_the_tail_with_zeros() -> None:
    blocks = blocks_of(np.arange(10, dtype=np.float32).reshape(2, 5) + 1, 3)
    assert blocks.tolist() == [[[1, 2, 3], [4, 5, 0]], [[6, 7, 8], [9, 10, 0]]]


def test_store_keeps_what_fits() -> None:
    words = np.array([[65504.0, -1.0]], np.float32)
    assert store(words, "float16").tolist() == words.tolist()
    with pytest.raises(LeftAlone, match="float16"):
        store(words * -2, "float16")
    with pytest.raises(LeftAlone, match=r"lost in float16.*codebook=float32"):
        store(words * np.float32(1e-10), "float16")
    assert not store(np.zeros((2, 3), np.float32), "float16").any()


# ---------------------------------------------------------------- what each claims


@pytest.mark.parametrize(
    ("bits", "low", "high"),
    # Max (1960): the best 4-bit quantiser of a Gaussian has 20.22 dB, 1 bit 4.40 dB; at 8 bits Panter and Dite's
    # 6.02 * 8 - 4.35 = 43.8 dB, and a little more because a sample ends somewhere.
    [(1, 4.3, 4.5), (4, 20.0, 20.5), (8, 42.5, 45.5)],
)
def test_kmeans_is_the_best_scalar_quantiser(bits: int, low: float, high: float) -> None:
    layer = gaussian(128, 256, 0)
    found = snr(layer, KMeans(bits=bits).encode(layer))
    assert low < found < high, f"{bits} bits on {layer.name}: {found} dB"


def test_kmeans_has_one_codebook_of_scalars() -> None:
    form = KMeans(bits=4).encode(gaussian(64, 64, 0))
    assert (form.stages, form.books, form.words, form.width, form.scales) == (1, 1, 16, 1, None)
    assert form.nbytes == 64 * 64 // 2 + 16 * 2


def test_pq_beats_scalars_and_not_the_rate_distortion_bound() -> None:
    """Independent Gaussians at 2 bits a weight: scalars reach 9.30 dB, nothing reaches 12.04 dB."""
    layer = gaussian(256, 256, 0)
    found = snr(layer, PQ(width=4, bits=8).encode(layer))
    assert 9.5 < found < 11.2, f"{layer.name}: {found} dB"


def test_pq_uses_what_blocks_have_in_common() -> None:
    """Weights that are sums of few patterns: far beyond what independent weights allow."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(256, 8))
    weight = patterns[rng.integers(0, 256, (128, 16))].reshape(128, 128) + 0.01 * rng.normal(size=(128, 128))
    layer = Layer("patterns", "Gemm", weight.astype(np.float32))
    assert snr(layer, PQ(width=8, bits=8).encode(layer)) > 15
    assert snr(gaussian(128, 128, 0), PQ(width=8, bits=8).encode(gaussian(128, 128, 0))) < 9


@pytest.mark.parametrize("seed", range(3))
def test_a_book_for_each_group_suits_columns_that_differ(seed: int) -> None:
    layer = gaussian(256, 32, seed)
    layer = replace(layer, weight=layer.weight * np.repeat([0.01, 1, 3, 30], 8).astype(np.float32))
    one, group = PQ(bits=4).encode(layer), PQ(bits=4, books="group").encode(layer)
    assert (one.books, group.books) == (1, 4)
    assert group.nbytes - one.nbytes == 3 * 16 * 8 * 2
    for part in range(4):  # the groups that matter little are the ones that one book forgets
        cut = slice(8 * part, 8 * part + 8)
        error = [float(np.sum((layer.weight - form.decode())[:, cut] ** 2)) for form in (one, group)]
        assert error[1] <= error[0] * 1.02, f"group {part}, seed {seed}: {error}"


def test_a_group_with_few_vectors_gets_a_padded_book() -> None:
    layer = gaussian(64, 16, 0)
    layer.weight[:, :8] = 0.5  # one distinct vector in the first group
    form = PQ(bits=4, books="group").encode(layer)
    assert form.codebooks.shape == (1, 2, 16, 8)
    assert (form.decode()[:, :8] == 0.5).all()


def metric_error(layer: Layer, form: Coded) -> float:
    """The metric of Stock et al.: sum over the blocks of ``e^T G e``."""
    assert layer.moments is not None
    error = blocks_of(layer.weight - form.decode(), form.width).reshape(-1, form.width).astype(np.float64)
    return float(np.einsum("ni,ij,nj->", error, layer.moments.pooled_gram(form.width), error))


@pytest.mark.parametrize(("kernel", "width"), [((3, 3), 9), ((1, 1), 4), ((1, 1), 8), ((), 4)])
def test_bgd_lowers_the_output_error_at_the_same_size(kernel: tuple[int, ...], width: int) -> None:
    gains, outputs = [], []
    for seed in range(4):
        layer = with_moments(gaussian(144, 144, seed, kernel))
        bits = 6
        plain, ours = PQ(width=width, bits=bits).encode(layer), BGD(width=width, bits=bits).encode(layer)
        assert ours.nbytes == plain.nbytes, spell(BGD(width=width, bits=bits), layer)
        gains.append(10 * np.log10(metric_error(layer, plain) / metric_error(layer, ours)))
        assert layer.moments is not None
        energies = [layer.moments.energy(layer.weight - form.decode()) for form in (plain, ours)]
        outputs.append(10 * np.log10(energies[0] / energies[1]))
    where = f"kernel {kernel} width {width}: in the metric {gains} dB, output {outputs} dB"
    assert min(gains) > 0.2, where
    assert np.mean(outputs) > 0, where
    assert max(gains) < 25, where  # better by more than the metric's condition would be a mistake in the measure


def test_bgd_without_moments_is_plain() -> None:
    layer = gaussian(144, 144, 0)
    plain, ours = PQ(width=4, bits=6).encode(layer), BGD(width=4, bits=6).encode(layer)
    assert array_bytes(plain) == array_bytes(ours)


def test_bgd_leaves_the_first_layer_alone_unless_told() -> None:
    layer = with_moments(gaussian(64, 72, 0, (3, 3), first=True))
    with pytest.raises(LeftAlone, match="first=true"):
        BGD().encode(layer)
    assert BGD(first=True).encode(layer).shape == (64, 72)
    assert BGD().encode(replace(layer, first=False)).shape == (64, 72)


@pytest.mark.parametrize(
    ("kernel", "cols", "small", "large"),
    [
        ((3, 3), 72, 9, 18),
        ((1, 1), 64, 4, 8),
        ((), 64, 4, 4),
        ((3,), 72, 3, 6),
        ((7, 7), 147, 49, 98),
        ((1,), 64, 4, 8),
    ],
)
def test_bgd_takes_the_blocks_of_the_paper(kernel: tuple[int, ...], cols: int, small: int, large: int) -> None:
    layer = gaussian(128, cols, 0, kernel)
    assert BGD(blocks="small").encode(layer).width == small
    assert BGD(blocks="large").encode(layer).width == large
    assert BGD(width=5).encode(layer).width == 5


def test_bgd_keeps_the_codebook_below_a_quarter_of_the_vectors() -> None:
    layer = gaussian(64, 64, 0, (1, 1))
    assert BGD(blocks="large").encode(layer).words == 64  # as in the released checkpoint
    with pytest.raises(LeftAlone, match="8 vectors of width 4 are too few"):
        BGD().encode(gaussian(1, 32, 0))


@pytest.mark.parametrize("kind", [PQ, BGD, Residual])
def test_a_width_beyond_the_row_is_left_alone_with_both_numbers(kind: type[Method]) -> None:
    with pytest.raises(LeftAlone, match="width 9 is more than the 8 columns of a row; choose 1 to 8"):
        kind(width=9).encode(gaussian(500, 8, 0))


def test_only_these_ask_for_data() -> None:
    assert [kind.id for kind in METHODS if kind.needs is Needs.MOMENTS] == [
        "bgd",
        "transform",
        "refined",
        "settled",
        "entropy",
        "best",
    ]


# ---------------------------------------------------------------- codes of more than a byte


@pytest.mark.parametrize(("kind", "most"), [(PQ, 4096), (BGD, 1024)])
def test_more_words_than_a_byte_counts(kind: type[Method], most: int) -> None:
    layer = with_moments(gaussian(64, 160, 0))  # 5,120 vectors, so that a codebook by the paper's rule ends at 1,024
    found = []
    for bits in (8, 10, 12):
        method = kind(width=2, bits=bits)
        form = encode(method, layer)
        assert isinstance(form, Coded), spell(method, layer)
        words = min(2**bits, most)
        assert (form.words, form.codes.max()) == (words, words - 1), spell(method, layer)
        assert form.nbytes == 64 * row_bytes(80, code_bits(words)) + 2 * words * 2, spell(method, layer)
        found.append(snr(layer, form))
    # One bit more a weight is 6.02 dB at high rates, and more where there are few vectors for each word.
    assert 5 < found[1] - found[0] < 9, f"{spell(kind(width=2), layer)}: {found}"
    assert found[2] > found[1] + 6 if most > 1024 else found[2] == found[1], f"{spell(kind(width=2), layer)}: {found}"


def test_bits_end_at_twelve() -> None:
    for kind in (PQ, BGD):
        with pytest.raises(OptionError, match=f"'{kind.id}': bits is 13; choose 1 to 12"):
            kind(bits=13)
    with pytest.raises(OptionError, match="'bgd': classifier_bits is 13; choose 1 to 12"):
        BGD(classifier_bits=13)


def test_bgd_may_give_the_classifier_more_bits() -> None:
    classifier = with_moments(gaussian(96, 96, 0, last=True))
    method = BGD(bits=6, classifier_bits=9)
    assert array_bytes(method.encode(classifier)) == array_bytes(BGD(bits=9).encode(classifier))
    assert method.encode(classifier).words == 512
    assert BGD(bits=6).encode(classifier).words == 64
    assert BGD(bits=6, classifier_bits=3).encode(classifier).words == 8
    for other in (replace(classifier, last=False), with_moments(gaussian(96, 96, 0, (1, 1), last=True))):
        assert array_bytes(method.encode(other)) == array_bytes(BGD(bits=6).encode(other)), spell(method, other)


def test_bgd_clamps_the_codebook_of_the_classifier_too() -> None:
    classifier = gaussian(64, 64, 0, last=True)  # 1,024 vectors
    assert BGD(classifier_bits=11).encode(classifier).words == 128
    assert BGD(classifier_bits=9, clamp="vectors").encode(classifier).words == 512


# ---------------------------------------------------------------- residual


def error_of(layer: Layer, form: Form) -> float:
    return float(np.sum((layer.weight - form.decode()).astype(np.float64) ** 2))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 30),
    bits=st.integers(1, 5),
    width=st.sampled_from([None, 1, 3, 8]),
    codebook=st.sampled_from(["float16", "float32"]),
    exponent=st.integers(-4, 3),
    seed=st.integers(0, 99),
)
def test_more_stages_never_raise_the_error(
    rows: int, cols: int, bits: int, width: int | None, codebook: Any, exponent: int, seed: int
) -> None:
    layer = gaussian(rows, max(cols, width or 1), seed)
    layer = replace(layer, weight=layer.weight * np.float32(10.0**exponent))
    method = Residual(width=width, bits=bits, codebook=codebook)
    if isinstance(encode(replace(method, stages=1), layer), str):
        return  # the weights themselves are beyond float16
    forms = [replace(method, stages=stages).encode(layer) for stages in (1, 2, 3, 4)]
    errors = [error_of(layer, form) for form in forms]
    energy = float(np.sum(layer.weight.astype(np.float64) ** 2))
    assert all(b <= a + 1e-13 * energy for a, b in pairwise(errors)), errors
    for form in forms[1:]:
        first = forms[0].codes[0].tobytes()
        assert form.codes[0].tobytes() == first, "the stages before are the same"


def test_stages_with_few_vectors_are_padded() -> None:
    form = Residual(width=None, bits=5, stages=3).encode(few_values())  # one distinct row: nothing left after a stage
    assert form.codebooks.shape[2:] == (1, 72)
    form = Residual(width=4, bits=2, stages=2).encode(few_values())  # three distinct vectors, then one
    assert form.codebooks.shape == (2, 1, 3, 4)
    assert not form.codebooks[1].any()


def test_two_stages_of_a_byte_are_better_than_one_of_half_the_width_costs() -> None:
    """Two stages take the bytes of blocks half as wide, and one more codebook of half a wide one."""
    layer = gaussian(256, 64, 0)
    one, two = PQ(width=8).encode(layer), Residual(width=8, stages=2).encode(layer)
    assert two.nbytes == 2 * one.nbytes
    assert snr(layer, two) > snr(layer, one) + 4
    same = Residual(width=8, stages=1).encode(layer)
    assert array_bytes(same) == array_bytes(one), "one stage is product quantisation"


# ---------------------------------------------------------------- binary


def test_binary_without_a_scale_is_the_sign() -> None:
    layer = gaussian(20, 30, 0)
    form = Binary(scale="none").encode(layer)
    np.testing.assert_array_equal(form.decode(), np.where(layer.weight >= 0, 1, -1))
    assert form.scales is None
    assert form.nbytes == 20 * 4 + 2 * 2


@given(seed=st.integers(0, 99), rows=st.integers(1, 12), cols=st.integers(1, 40), nudge=st.floats(0.5, 2))
@settings(max_examples=30)
def test_the_scale_of_signs_is_the_best_there_is(seed: int, rows: int, cols: int, nudge: float) -> None:
    layer = gaussian(rows, cols, seed)
    row = Binary(scale="row", codebook="float32").encode(layer)
    whole = Binary(scale="layer", codebook="float32").encode(layer)
    assert row.scales is not None
    energy = float(np.sum(layer.weight.astype(np.float64) ** 2))
    assert error_of(layer, row) <= error_of(layer, whole) + 1e-6 * energy
    for form in (row, whole):
        other = Dense((form.decode() * nudge).astype(np.float32))
        assert error_of(layer, form) <= error_of(layer, other) + 1e-6 * energy


@given(seed=st.integers(0, 99), scale=st.sampled_from(["none", "layer", "row"]), rows=st.integers(1, 20))
@settings(max_examples=30)
def test_more_planes_never_raise_the_error(seed: int, scale: Any, rows: int) -> None:
    layer = gaussian(rows, 24, seed)
    layer = replace(layer, weight=layer.weight * np.logspace(-2, 1, rows, dtype=np.float32)[:, None])
    errors = [error_of(layer, Binary(scale=scale, planes=planes).encode(layer)) for planes in range(1, 9)]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors)), errors
    assert errors[-1] < errors[0]


def test_binary_of_a_gaussian_is_the_best_one_bit_quantiser() -> None:
    layer = gaussian(128, 256, 0)
    assert 4.3 < snr(layer, Binary().encode(layer)) < 4.5  # Max (1960): 4.40 dB


def test_a_row_of_zeros_stays_zero() -> None:
    layer = gaussian(4, 9, 0)
    layer.weight[2] = 0
    assert not Binary(planes=2).encode(layer).decode()[2].any()


# ---------------------------------------------------------------- svd


@given(seed=st.integers(0, 99), rows=st.integers(2, 30), cols=st.integers(2, 30), data=st.data())
@settings(max_examples=30)
def test_svd_is_the_nearest_matrix_of_its_rank(seed: int, rows: int, cols: int, data: st.DataObject) -> None:
    """Eckart and Young: the error is that of the singular values that are left out."""
    layer = gaussian(rows, cols, seed)
    most = min(rows, cols, (4 * rows * cols - 1) // (4 * (rows + cols)))
    if most == 0:
        return
    rank = data.draw(st.integers(1, most))
    form = SVD(rank=rank, factors="float32").encode(layer)
    assert form.left.shape == (rows, rank)
    left_out = np.linalg.svd(layer.weight.astype(np.float64), compute_uv=False)[rank:]
    energy = float(np.sum(layer.weight.astype(np.float64) ** 2))
    assert error_of(layer, form) == pytest.approx(float(np.sum(left_out**2)), rel=1e-4, abs=1e-10 * energy)


@given(rows=st.integers(1, 60), cols=st.integers(1, 60), share=st.floats(0.05, 0.95), single=st.booleans())
@settings(max_examples=40)
def test_svd_takes_its_share_of_the_bytes_and_no_more(rows: int, cols: int, share: float, single: bool) -> None:
    layer = gaussian(rows, cols, 0)
    method = SVD(share=share, factors="float32" if single else "float16")
    form, each = encode(method, layer), (rows + cols) * (4 if single else 2)
    if isinstance(form, str):
        assert each > share * layer.weight.nbytes or each >= layer.weight.nbytes, form
        return
    assert form.nbytes <= share * layer.weight.nbytes
    rank = form.nbytes // each
    assert rank == min(rows, cols) or form.nbytes + each > share * layer.weight.nbytes


def test_a_rank_that_saves_nothing_is_left_alone() -> None:
    layer = gaussian(64, 64, 0)
    with pytest.raises(LeftAlone, match=r"rank 900 is more than the 64 of 64 x 64; choose 1 to 63"):
        SVD(rank=900).encode(layer)
    with pytest.raises(LeftAlone, match=r"rank 64 takes 16384 bytes, the weight 16384; choose 1 to 63"):
        SVD(rank=64).encode(layer)
    assert SVD(rank=63).encode(layer).nbytes < layer.weight.nbytes
    with pytest.raises(LeftAlone, match=r"rank 32 .*; choose 1 to 31"):
        SVD(rank=32, factors="float32").encode(layer)
    assert SVD(rank=31, factors="float32").encode(layer).nbytes < layer.weight.nbytes
    with pytest.raises(LeftAlone, match="no rank makes it smaller"):
        SVD(rank=1).encode(gaussian(1, 1, 0))


def test_factors_of_a_dependent_weight_are_exact() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 50))).astype(np.float32)
    layer = Layer("rank-3", "Gemm", weight)
    assert snr(layer, SVD(rank=8, factors="float32").encode(layer)) > 100


def test_factors_beyond_float16_name_their_own_option() -> None:
    layer = gaussian(64, 72, 0)
    with pytest.raises(LeftAlone, match="set factors=float32"):
        SVD().encode(replace(layer, weight=layer.weight * 1e-12))


# ---------------------------------------------------------------- dqc


def cascade(weight: float, top: int, count: int, zero: bool) -> float:
    """The quantiser of Rao et al. as they write it, one weight and one bound after the other."""
    size = abs(weight)
    for k in range(top, top - count, -1):
        if size >= 0.75 * 2.0**k:
            return float(np.copysign(2.0**k, weight))
    return 0.0 if zero else float(np.copysign(2.0 ** (top - count + 1), weight or 1.0))


@given(
    weights=st.lists(
        st.one_of(st.floats(-9, 9, width=32), st.sampled_from([0.0, 0.75, 1.5, -3.0, 2**-20])), min_size=1
    ),
    top=st.integers(-3, 3),
    bits=st.sampled_from([3, 4, 5]),
    zero=st.booleans(),
)
def test_the_closed_form_is_the_cascade(weights: list[float], top: int, bits: int, zero: bool) -> None:
    count = 2 ** (bits - 1) - zero
    matrix = np.array([weights], np.float32)
    book = power_book(top, count, zero=zero)[:, 0]
    assert (np.diff(book) > 0).all(), "ascending"
    assert len(book) == 2**bits - zero
    found = book[power_codes(matrix, top, count, zero=zero)]
    assert found[0].tolist() == [cascade(weight, top, count, zero) for weight in matrix[0].tolist()]


@pytest.mark.parametrize("exponent", [-30, -12, 0, 12, 30])
@pytest.mark.parametrize("zero", [True, False])
def test_words_are_exact_powers_of_two_in_the_smallest_type(exponent: int, zero: bool) -> None:
    layer = gaussian(20, 30, 0)
    layer = replace(layer, weight=np.ldexp(layer.weight, exponent))
    form = DQC(bits=5, zero=zero, fit="paper").encode(layer)
    sizes = np.abs(form.codebooks[form.codebooks != 0]).astype(np.float64)
    assert (np.frexp(sizes)[0] == 0.5).all()
    assert sizes.max() == 2.0 ** np.floor(np.log2(np.abs(layer.weight).max()))
    assert form.codebooks.dtype == (np.float16 if sizes.min() >= 2**-14 and sizes.max() < 65504 else np.float32)
    assert snr(layer, form) == pytest.approx(
        snr(gaussian(20, 30, 0), DQC(bits=5, zero=zero, fit="paper").encode(gaussian(20, 30, 0)))
    )


def dqc_error(layer: Layer, form: Form, power: int) -> float:
    squares = np.ones((1, 1, layer.weight.shape[1]))
    if layer.moments is not None:
        squares = np.array([np.concatenate([np.diag(b) for b in blocks]) for blocks in layer.moments.blocks])[:, None]
    error = (layer.weight - form.decode()).astype(np.float64) ** 2 * np.abs(layer.weight.astype(np.float64)) ** power
    return float(np.sum(error.reshape(len(squares), -1, layer.weight.shape[1]) * squares))


@settings(max_examples=40)
@given(
    bits=st.sampled_from([3, 4, 5]),
    zero=st.booleans(),
    power=st.sampled_from([0, 1, 2]),
    groups=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 99),
)
def test_search_and_scales_never_raise_the_error_that_they_count(
    bits: Any, zero: bool, power: Any, groups: int, seed: int
) -> None:
    layer = gaussian(12, 20, seed)
    layer = with_moments(layer, groups) if groups else layer
    method = DQC(bits=bits, zero=zero, power=power, fit="paper", feedback=False)
    ways = [method, replace(method, fit="search"), replace(method, fit="search", scale="row")]
    errors = [dqc_error(layer, way.encode(layer), power) for way in ways]
    assert errors == sorted(errors, reverse=True) or np.ptp(errors) < 1e-6 * errors[0], errors
    scaled = dqc_error(layer, replace(method, scale="row").encode(layer), power)
    assert scaled <= errors[0] * (1 + 1e-6)


def test_four_bits_are_about_as_good_as_five() -> None:
    """Gaussian weights: 14.1 dB, for powers of two leave a third between them however many there are."""
    layer = gaussian(128, 256, 0)
    for zero in (True, False):
        three, four, five = (snr(layer, DQC(bits=bits, zero=zero, fit="paper").encode(layer)) for bits in (3, 4, 5))
        assert three < four <= five < four + 0.2
        assert 13.9 < four < 14.4


def test_a_scale_costs_two_bytes_a_row() -> None:
    layer = gaussian(30, 40, 0)
    plain, scaled = DQC().encode(layer), DQC(scale="row").encode(layer)
    assert scaled.nbytes - plain.nbytes == 2 * 30
    assert plain.nbytes == 30 * 20 + 15 * plain.codebooks.itemsize


def test_weights_without_a_power_of_two_are_left_alone() -> None:
    layer = gaussian(8, 8, 0)
    with pytest.raises(LeftAlone, match="set zero=true"):
        DQC(zero=False).encode(replace(layer, weight=np.zeros((8, 8), np.float32)))
    with pytest.raises(LeftAlone, match="too small for 7 powers of two"):
        DQC().encode(replace(layer, weight=np.ldexp(layer.weight, -125)))


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-6, 1e7, 1e30])
def test_steps_beyond_float16_are_float32(size: float) -> None:
    plain = with_moments(gaussian(40, 36, 3))
    layer = replace(plain, weight=(plain.weight * np.float32(size)).astype(np.float32))
    method = Entropy(step=0.5)
    usual, form = method.encode(plain), method.encode(layer)
    assert usual.scales is not None
    assert form.scales is not None
    assert (usual.scales.dtype, form.scales.dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(form.decode() / np.float32(size), usual.decode(), rtol=1e-3)
    assert [offer.bytes for offer in Best(codes="prefix").offers(layer)]
    if size < 1:  # words of float16 cannot hold these, scales can
        with_scales = {str(offer.method.options.get("scale")) for offer in Best(codebook="float16").offers(layer)}
        assert with_scales == {"row", "None"}
        with_scales = {str(offer.method.options.get("scale")) for offer in Best().offers(layer)}
        assert with_scales == {"row", "none", "None"}


def test_very_wide_layers_are_encoded_without_a_full_matrix_of_moments() -> None:
    rows = np.random.default_rng(0).normal(size=(1, 20, FULL_COLS + 9)).astype(np.float32)
    layer = gaussian(6, FULL_COLS + 9, 3, moments=moments_of(rows))
    for method in (Entropy(), Refined()):
        with pytest.raises(LeftAlone, match=r"8,201 columns are more than 8,192.*; choose bgd"):
            method.encode(layer)
    for codes in ("fixed", "prefix"):
        best = Best(codes=codes)
        offers = best.offers(layer)
        assert {offer.method.id for offer in offers} == {"bgd", "kmeans", "rtn"}
        assert min(offer.error for offer in offers) > 0
        assert snr(layer, replace(best, bits=6.1).encode(layer)) > 20


@pytest.mark.parametrize(
    ("option", "value", "of_refined"),
    [
        ("scale", "none", True),
        ("scale", "row", True),
        ("start", "assign", True),
        ("codebook", "float16", True),
        ("asymmetric", False, True),
        ("fine", "rtn", False),
    ],
)
def test_each_part_of_best_can_be_switched(option: str, value: object, of_refined: bool) -> None:
    layer = with_moments(gaussian(40, 36, 4))
    usual, changed = Best().offers(layer), Best(**{option: value}).offers(layer)
    if of_refined:
        assert {offer.method.options[option] for offer in changed if offer.method.id == "refined"} == {value}
        assert {offer.method.options[option] for offer in usual if offer.method.id == "refined"} != {value}
    else:
        assert {offer.method.id for offer in changed} == {"refined", value}
        assert {offer.method.id for offer in usual} == {"refined", "settled"}


def test_layers_too_large_for_prefix_codes_have_others(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = with_moments(gaussian(40, 36, 4))
    prefix = {offer.method.id for offer in Best(codes="prefix").offers(layer)}
    assert prefix == {"entropy", "settled"}
    for module in ("entropy", "best"):
        monkeypatch.setattr(f"vqonnx.methods.{module}.MOST_WEIGHTS", 40 * 36 - 1)
    with pytest.raises(LeftAlone, match="1,440 weights are too many for prefix codes"):
        Entropy().encode(layer)
    assert {offer.method.id for offer in Best(codes="prefix").offers(layer)} == {"refined", "settled"}
