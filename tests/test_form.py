"""The codec: packing, decoding against loops, sizes in bytes, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vqonnx.errors import FormError
from vqonnx.form import Blocks, Coded, Codes, Dense, Product, code_bits, code_dtype, pack, row_bytes, unpack

# ---------------------------------------------------------------- packing


def bit_string(codes: Codes, bits: int) -> bytes:
    """One row by the definition in docs/format.md: code i is bits [i*bits, (i+1)*bits) of one little-endian number."""
    number = sum(int(code) << i * bits for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, Codes]:
    bits, rows, groups = draw(st.integers(1, 16)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * groups, max_size=rows * groups))
    return bits, np.array(values, np.uint8 if bits <= 8 else np.uint16).reshape(rows, groups)


@given(rows_of_codes())
def test_pack_is_the_bit_string_of_the_format(case: tuple[int, Codes]) -> None:
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(codes), row_bytes(codes.shape[1], bits)), f"bits {bits}, codes {codes.shape}"
    for row, stored in zip(codes, packed, strict=True):
        assert stored.tobytes() == bit_string(row, bits), f"bits {bits}, codes {row}"


@given(rows_of_codes())
def test_what_is_packed_unpacks_to_itself(case: tuple[int, Codes]) -> None:
    bits, codes = case
    back = unpack(pack(codes, bits), bits, codes.shape[1])
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes, err_msg=f"bits {bits}")


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_length_and_every_code(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for groups in range(1, 70):
        codes = rng.integers(0, 2**bits, (2, 3, groups)).astype(code_dtype(bits))
        codes[0, 0] = 2**bits - 1
        packed = pack(codes, bits)
        np.testing.assert_array_equal(unpack(packed, bits, groups), codes, err_msg=f"bits {bits}, groups {groups}")
        assert packed[1, 2].tobytes() == bit_string(codes[1, 2], bits), f"bits {bits}, groups {groups}"


@pytest.mark.parametrize("bits", range(1, 17))
def test_bits_left_over_at_the_end_are_ignored(bits: int) -> None:
    groups = 5
    packed = pack(np.zeros((1, groups), np.uint8), bits)
    left = 8 * packed.shape[1] - groups * bits
    packed[0, -1] |= 0xFF & ~(0xFF >> left)
    assert not unpack(packed, bits, groups).any(), f"bits {bits}, {left} bits left over"


def test_an_example_by_hand() -> None:
    # 3 bits: 5 | 1 << 3 | 7 << 6 = 0b1_1100_1101
    assert pack(np.array([5, 1, 7], np.uint8), 3).tolist() == [0b11001101, 0b1]
    # 11 bits: 1027 | 2 << 11 = 0b1_0100_0000_0011
    assert pack(np.array([1027, 2], np.uint16), 11).tolist() == [0b00000011, 0b00010100, 0b0]


def test_codes_of_one_byte_need_no_longer_type() -> None:
    codes = np.arange(256, dtype=np.uint8)
    for bits in range(8, 17):
        packed = pack(codes, bits)
        assert packed.tobytes() == bit_string(codes, bits), f"bits {bits}"
        np.testing.assert_array_equal(pack(codes.astype(np.uint16), bits), packed, err_msg=f"bits {bits}")


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_bits_outside_1_to_16_are_refused(bits: int) -> None:
    with pytest.raises(FormError, match=rf"bits is {bits}\b.*1 to 16"):
        pack(np.zeros((1, 1), np.uint8), bits)
    with pytest.raises(FormError, match=rf"bits is {bits}\b.*1 to 16"):
        unpack(np.zeros((1, 1), np.uint8), bits, 1)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FormError, match=r"code 8 .* 3 bits"):
        pack(np.array([[1, 8]], np.uint8), 3)
    with pytest.raises(FormError, match=r"code 2048 .* 11 bits"):
        pack(np.array([[1, 2048]], np.uint16), 11)


@pytest.mark.parametrize("stored", [2, 4])
def test_a_row_of_the_wrong_length_is_refused(stored: int) -> None:
    with pytest.raises(FormError, match=rf"8 codes of 3 bits take 3 bytes a row, not {stored}"):
        unpack(np.zeros((1, stored), np.uint8), 3, 8)


@given(st.integers(1, 2**16))
def test_code_bits_is_the_least_that_is_enough(words: int) -> None:
    bits = code_bits(words)
    assert words <= 2**bits
    assert bits == 1 or words > 2 ** (bits - 1)


# ---------------------------------------------------------------- Coded


@st.composite
def coded(draw: st.DrawFn) -> Coded:
    """Any stages, books, words, widths, tails, types and scales."""
    stages, rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    cols = draw(st.integers(1, 17))
    groups = -(-cols // width)
    books = draw(st.integers(1, groups))
    words = draw(st.sampled_from((1, 2, 3, 5, 16, 17, 255, 256, 257, 1024, 2047, 65536)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from((np.int8, np.float16, np.float32)))
    shape = draw(st.sampled_from((None, (rows, 1), (1, 1))))
    scale_kind = draw(st.sampled_from((np.float16, np.float32)))
    return Coded(
        codes=rng.integers(0, words, (stages, rows, groups)).astype(np.uint16),
        codebooks=(rng.uniform(-1, 1, (stages, books, words, width)) * (127 if kind == np.int8 else 3)).astype(kind),
        cols=cols,
        scales=None if shape is None else rng.normal(size=shape).astype(scale_kind),
    )


def spell(form: Coded) -> str:
    scales = None if form.scales is None else (form.scales.dtype, form.scales.shape)
    return f"codes {form.codes.shape}, codebooks {form.codebooks.dtype}{form.codebooks.shape}, scales {scales}"


def decode_by_loops(form: Coded) -> NDArray[np.float32]:
    """docs/format.md, Values, word by word: float32, stages first to last, then the scale, then the cut."""
    stages, rows, groups = form.codes.shape
    matrix = np.zeros((rows, form.cols), np.float32)
    for row in range(rows):
        for group in range(groups):
            for at in range(form.width):
                if group * form.width + at >= form.cols:
                    continue
                total = None
                for stage in range(stages):
                    value = np.float32(form.codebooks[stage, group % form.books, form.codes[stage, row, group], at])
                    total = value if total is None else np.float32(total + value)
                if form.scales is not None:
                    total = np.float32(total * np.float32(form.scales[row if len(form.scales) > 1 else 0, 0]))
                matrix[row, group * form.width + at] = total
    return matrix


@given(coded())
def test_decode_is_the_triple_loop_bit_for_bit(form: Coded) -> None:
    decoded = form.decode()
    assert decoded.shape == form.shape == (form.codes.shape[1], form.cols), spell(form)
    assert decoded.dtype == np.float32
    assert decoded.flags.c_contiguous
    assert decoded.tobytes() == decode_by_loops(form).tobytes(), spell(form)


@given(coded())
def test_coded_counts_every_stored_byte(form: Coded) -> None:
    stored = [form.packed, form.codebooks] + ([] if form.scales is None else [form.scales])
    assert form.nbytes == sum(len(array.tobytes()) for array in stored), spell(form)


@given(coded())
def test_packed_codes_are_the_codes(form: Coded) -> None:
    assert form.packed.shape == (form.stages, form.shape[0], row_bytes(form.groups, form.bits)), spell(form)
    np.testing.assert_array_equal(unpack(form.packed, form.bits, form.groups), form.codes, err_msg=spell(form))


@given(coded(), st.sampled_from((np.uint8, np.uint16)))
def test_codes_have_the_one_type_that_their_words_need(form: Coded, given: type) -> None:
    want = np.dtype(np.uint16 if form.words > 256 else np.uint8)
    assert form.codes.dtype == want, spell(form)
    if form.codes.max() <= np.iinfo(given).max:
        again = Coded(form.codes.astype(given), form.codebooks, form.cols, form.scales)
        assert again.codes.dtype == want, f"given {given.__name__}: {spell(form)}"
        np.testing.assert_array_equal(again.codes, form.codes)


@given(coded())
def test_names_of_the_sizes(form: Coded) -> None:
    assert form.codes.shape == (form.stages, form.shape[0], form.groups)
    assert form.codebooks.shape == (form.stages, form.books, form.words, form.width)
    assert form.groups == -(-form.cols // form.width)


@pytest.mark.parametrize(("codebook", "books"), [(np.arange(6.0), 1), (np.arange(12.0), 2)])
def test_one_stage_takes_one_codebook_or_one_a_group(codebook: NDArray[np.floating], books: int) -> None:
    shape = (3, 2) if books == 1 else (2, 3, 2)
    form = Coded.one_stage(np.array([[0, 2], [1, 1]]), codebook.astype(np.float32).reshape(shape))
    assert (form.stages, form.books, form.words, form.width, form.cols) == (1, books, 3, 2, 4)
    second = 0 if books == 1 else 6
    assert form.decode().tolist() == [[0, 1, second + 4, second + 5], [2, 3, second + 2, second + 3]]


@pytest.mark.parametrize(
    ("rows", "cols", "width", "words"),
    [(1, 1, 1, 1), (1, 7, 3, 2), (5, 1, 1, 3), (4, 1, 8, 2), (3, 9, 4, 256), (2, 8, 8, 1), (3, 9, 4, 300)],
    ids=lambda value: str(value),
)
def test_degenerate_sizes(rows: int, cols: int, width: int, words: int) -> None:
    """One row, one column, one word, and a vector longer than a row."""
    rng = np.random.default_rng(rows)
    form = Coded(
        rng.integers(0, words, (1, rows, -(-cols // width))).astype(np.uint16),
        rng.normal(size=(1, 1, words, width)).astype(np.float16),
        cols,
    )
    assert form.decode().tobytes() == decode_by_loops(form).tobytes(), spell(form)
    assert form.nbytes == form.packed.nbytes + 2 * words * width, spell(form)


def make(**changes: object) -> Coded:
    """A valid form of 2 stages, 3 rows, 7 columns in 3 groups of width 3, with some of its parts exchanged."""
    parts: dict[str, object] = {
        "codes": np.zeros((2, 3, 3), np.uint8),
        "codebooks": np.zeros((2, 1, 4, 3), np.float32),
        "cols": 7,
        "scales": None,
    }
    return Coded(**{**parts, **changes})  # type: ignore[arg-type]


def test_the_parts_that_are_exchanged_below_fit_together() -> None:
    assert make().shape == (3, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.zeros((2, 3, 3), np.int64)}, r"int64\[2, 3, 3\].*uint8 or uint16 \[stages, rows, groups\]"),
        ({"codes": np.zeros((3, 3), np.uint8)}, r"uint8\[3, 3\].*\[stages, rows, groups\]"),
        ({"codes": np.zeros((2, 0, 3), np.uint8)}, r"uint8\[2, 0, 3\]"),
        (
            {"codebooks": np.zeros((2, 1, 4, 3))},
            r"codebooks are float64\[2, 1, 4, 3\].* int8, float16 or float32 with 4",
        ),
        ({"codebooks": np.zeros((1, 4, 3), np.float32)}, r"codebooks are float32\[1, 4, 3\].*4 axes"),
        ({"codebooks": np.zeros((2, 1, 0, 3), np.float32)}, r"codebooks are float32\[2, 1, 0, 3\]"),
        ({"codebooks": np.full((2, 1, 4, 3), np.inf, np.float16)}, r"codebooks hold a value that is not finite"),
        ({"codebooks": np.full((2, 1, 4, 3), np.nan, np.float32)}, r"codebooks hold a value that is not finite"),
        ({"codebooks": np.zeros((1, 1, 4, 3), np.float32)}, r"codes have 2 stages, codebooks 1"),
        ({"codebooks": np.zeros((2, 1, 65537, 3), np.float32)}, r"65537 words.*16 bits reach 65536"),
        ({"codes": np.full((2, 3, 3), 4, np.uint8)}, r"code 4 is beyond the codebook of 4 words"),
        ({"codes": np.full((2, 3, 3), 256, np.uint16)}, r"code 256 is beyond the codebook of 4 words"),
        ({"cols": 10}, r"3 groups of width 3 do not make 10 columns"),
        ({"cols": 6}, r"3 groups of width 3 do not make 6 columns"),
        ({"cols": 0}, r"3 groups of width 3 do not make 0 columns"),
        ({"codebooks": np.zeros((2, 4, 4, 3), np.float32)}, r"4 books for 3 groups"),
        ({"scales": np.ones((2, 1), np.float32)}, r"scales are \[2, 1\].*\[3, 1\] or \[1, 1\]"),
        ({"scales": np.ones((1, 3), np.float32)}, r"scales are \[1, 3\].*\[3, 1\] or \[1, 1\]"),
        ({"scales": np.ones(3, np.float32)}, r"scales are float32\[3\].*2 axes"),
        ({"scales": np.ones((3, 1))}, r"scales are float64\[3, 1\]"),
        ({"scales": np.full((3, 1), np.nan, np.float32)}, r"scales hold a value that is not finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_both_sizes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FormError, match=message):
        make(**changes)


# ---------------------------------------------------------------- the other forms


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 4)])
def test_dense_is_its_values(shape: tuple[int, int], kind: type) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(kind)
    form = Dense(values)
    assert form.shape == shape
    assert form.nbytes == len(values.tobytes())
    assert form.decode().dtype == np.float32
    np.testing.assert_array_equal(form.decode(), values.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 2)), r"values are float64\[2, 2\].*2 axes"),
        (np.zeros(3, np.float32), r"values are float32\[3\].*2 axes"),
        (np.zeros((0, 3), np.float32), r"values are float32\[0, 3\]"),
        (np.array([[np.inf]], np.float32), r"values hold a value that is not finite"),
    ],
)
def test_dense_refuses(values: NDArray[np.floating], message: str) -> None:
    with pytest.raises(FormError, match=message):
        Dense(values)


@given(coded(), st.integers(1, 5), st.integers(0, 99))
def test_product_is_the_matrix_product_and_the_sum_of_bytes(right: Coded, rows: int, seed: int) -> None:
    left = Dense(np.random.default_rng(seed).normal(size=(rows, right.shape[0])).astype(np.float16))
    form = Product(left, right)
    assert form.shape == (rows, right.cols)
    assert form.nbytes == left.nbytes + right.nbytes
    decoded = form.decode()
    assert decoded.dtype == np.float32
    exact = left.values.astype(np.float64) @ decode_by_loops(right).astype(np.float64)
    np.testing.assert_allclose(decoded, exact, rtol=1e-4, atol=1e-4, err_msg=spell(right))


def test_product_refuses_factors_that_do_not_meet() -> None:
    with pytest.raises(FormError, match="left has 3 columns, right 4 rows"):
        Product(Dense(np.zeros((2, 3), np.float32)), Dense(np.zeros((4, 2), np.float32)))


@given(st.sampled_from((0, 1)), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_blocks_set_their_parts_side_by_side(axis: int, along: list[int], across: int) -> None:
    shapes = [(size, across) if axis == 0 else (across, size) for size in along]
    rng = np.random.default_rng(sum(along))
    parts = [Dense(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    form = Blocks(tuple(parts), axis)
    assert form.shape == ((sum(along), across) if axis == 0 else (across, sum(along))), f"{shapes}"
    assert form.nbytes == 4 * across * sum(along)
    decoded, start = form.decode(), 0
    assert decoded.shape == form.shape
    for part, size in zip(parts, along, strict=True):
        piece = decoded[start : start + size] if axis == 0 else decoded[:, start : start + size]
        np.testing.assert_array_equal(piece, part.values, err_msg=f"{shapes} axis {axis}")
        start += size


def test_forms_nest() -> None:
    dense = Dense(np.eye(2, dtype=np.float32))
    form = Blocks((Product(dense, Blocks((dense, dense), 1)), Blocks((Dense(np.full((1, 4), 7, np.float16)),), 0)), 0)
    assert form.shape == (3, 4)
    assert form.nbytes == 16 + 32 + 8
    assert form.decode().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [7, 7, 7, 7]]


def test_blocks_refuse() -> None:
    two, three = Dense(np.zeros((1, 2), np.float32)), Dense(np.zeros((1, 3), np.float32))
    with pytest.raises(FormError, match="0 parts on axis 0"):
        Blocks((), 0)
    with pytest.raises(FormError, match="1 parts on axis 2"):
        Blocks((two,), 2)
    with pytest.raises(FormError, match=r"axis 0 .*\[2, 3\]"):
        Blocks((two, three), 0)
    assert Blocks((two, three), 1).shape == (1, 5)
