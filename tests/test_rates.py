"""Rates: the bytes agree with those of the forms, and the sizes with those that papers print."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqonnx.form import Coded, Dense, Product
from vqonnx.method import Layer
from vqonnx.methods import DQC, PQ, SVD, Binary, KMeans, Residual
from vqonnx.methods.codebook import clamp_words
from vqonnx.rates import (
    PaperLayer,
    binary_rate,
    coded_bytes,
    kmeans_rate,
    paper_size_bits,
    paper_size_mib,
    pq_rate,
    product_bytes,
    residual_rate,
    svd_rate,
)


@given(data=st.data())
def test_the_bytes_are_those_of_the_form(data: st.DataObject) -> None:
    def draw(high: int) -> int:
        return data.draw(st.integers(1, high))

    rows, cols, words, width, stages = draw(9), draw(40), draw(3000), draw(12), draw(3)
    groups = -(-cols // width)
    books = draw(groups)
    kind = data.draw(st.sampled_from([np.float16, np.float32]))
    scales = data.draw(st.sampled_from([0, 1, rows]))
    form = Coded(
        codes=np.zeros((stages, rows, groups), np.uint8),
        codebooks=np.zeros((stages, books, words, width), kind),
        cols=cols,
        scales=np.full((scales, 1), 2, kind) if scales else None,
    )
    item = np.dtype(kind).itemsize
    expected = coded_bytes(rows, cols, words=words, width=width, stages=stages, books=books, item=item, scales=scales)
    assert form.nbytes == expected
    rank = draw(8)
    product = Product(Dense(np.zeros((rows, rank), kind)), Dense(np.zeros((rank, cols), kind)))
    assert product.nbytes == product_bytes(rows, cols, rank, item=item)


def test_the_bytes_are_those_of_the_methods() -> None:
    weight = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    layer = Layer("w", "Gemm", weight)
    sizes = {
        KMeans(bits=3): coded_bytes(96, 64, words=8),
        PQ(width=5, bits=4): coded_bytes(96, 64, words=16, width=5),
        PQ(width=4, bits=9): coded_bytes(96, 64, words=512, width=4),
        PQ(width=8, bits=4, books="group"): coded_bytes(96, 64, words=16, width=8, books=8),
        Residual(width=8, bits=5, stages=3): coded_bytes(96, 64, words=32, width=8, stages=3),
        Residual(width=None, bits=2, stages=2): coded_bytes(96, 64, words=4, width=64, stages=2),
        Binary(scale="none"): coded_bytes(96, 64, words=2),
        Binary(planes=3): coded_bytes(96, 64, words=2, stages=3, scales=96),
        DQC(bits=5, zero=True, scale="row", fit="paper"): coded_bytes(96, 64, words=31, scales=96),
        SVD(rank=7, factors="float32"): product_bytes(96, 64, 7, item=4),
    }
    for method, size in sizes.items():
        assert method.encode(layer).nbytes == size, method


@settings(max_examples=50)
@given(bits=st.integers(1, 12), rank=st.integers(1, 64), stages=st.integers(1, 8))
def test_rates_are_the_bytes_of_large_layers(bits: int, rank: int, stages: int) -> None:
    """Codebooks in float32, rows of whole bytes: what remains is one codebook of scalars, or the singular values."""
    rows, cols, words = 4096, 1024, 2**bits
    plain = 4 * rows * cols
    assert kmeans_rate(words) == pytest.approx(plain / coded_bytes(rows, cols, words=words, item=4), rel=0.01)
    assert binary_rate(stages) == pytest.approx(plain / coded_bytes(rows, cols, words=2, stages=stages), rel=0.01)
    assert svd_rate(rows, cols, rank) == pytest.approx(plain / product_bytes(rows, cols, rank, item=4), rel=0.001)
    pq = coded_bytes(rows, cols, words=words, width=8, books=128, item=4)
    assert pq_rate(rows, cols, 128, words) == pytest.approx(plain / pq)
    rq = coded_bytes(rows, cols, words=words, width=cols, stages=stages, item=4)
    ideal = residual_rate(rows, cols, stages, words)
    assert plain / rq <= ideal, "a code of a whole row takes whole bytes"
    assert bits != 8 or ideal == pytest.approx(plain / rq)


def test_the_rates_that_the_paper_plots() -> None:
    """Eight words, sub-vectors of 1 to 4 weights, a layer of 4096 x 4096."""
    rates = [round(pq_rate(4096, 4096, 4096 // width, 8), 1) for width in (1, 2, 3, 4)]
    assert rates == [10.4, 20.5, 30.1, 39.4]
    assert binary_rate() == 32


# ---------------------------------------------------------------- ResNets as Stock et al. count them

Kind = Literal["small", "large"]
Conv = tuple[str, int, int, int]  # name, outputs, inputs, kernel


def resnet(depth: Literal[18, 50]) -> list[Conv]:
    """The convolutions of the torchvision models."""
    blocks, grown = ([2, 2, 2, 2], 1) if depth == 18 else ([3, 4, 6, 3], 4)
    convs: list[Conv] = [("conv1", 64, 3, 7)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            if depth == 18:
                convs += [(f"{name}.conv1", width, inputs, 3), (f"{name}.conv2", width, width, 3)]
            else:
                convs += [(f"{name}.conv1", width, inputs, 1), (f"{name}.conv2", width, width, 3)]
                convs += [(f"{name}.conv3", width * grown, width, 1)]
            if inputs != width * grown:
                convs += [(f"{name}.downsample.0", width * grown, inputs, 1)]
            inputs = width * grown
    return convs


def counted(depth: Literal[18, 50], kind: Kind, keep: tuple[str, ...] = ()) -> tuple[list[PaperLayer], int]:
    """Compressed layers and the number of all other values; the first convolution stays as it is."""
    layers, rest = [], 0
    for name, outputs, inputs, kernel in resnet(depth):
        rest += 2 * outputs  # batch normalisation
        weights = outputs * inputs * kernel**2
        if name == "conv1" or name in keep:
            rest += weights
            continue
        width = (4 if kind == "small" or depth == 18 else 8) if kernel == 1 else 9 if kind == "small" else 18
        layers.append(PaperLayer(weights, width, clamp_words(256, weights // width)))
    features, words = (512, 2048) if depth == 18 else (2048, 1024)
    layers.append(PaperLayer(1000 * features, 4, clamp_words(words, 1000 * features // 4)))
    return layers, rest + 1000


@pytest.mark.parametrize(
    ("depth", "kind", "keep", "bits", "mib"),
    [
        (18, "small", (), 12_927_232, 1.54),
        (50, "large", (), 26_710_272, 3.18),
        (50, "small", (), 42_705_152, 5.09),
        (50, "small", ("layer1.0.conv3", "layer1.0.downsample.0"), 43_655_424, 5.20),
    ],
    ids=["resnet18-small", "resnet50-large", "resnet50-small", "resnet50-semi-supervised"],
)
def test_the_sizes_that_the_paper_prints(
    depth: Literal[18, 50], kind: Kind, keep: tuple[str, ...], bits: int, mib: float
) -> None:
    layers, rest = counted(depth, kind, keep)
    assert paper_size_bits(layers, rest) == bits
    assert round(paper_size_mib(layers, rest), 2) == mib


@pytest.mark.parametrize(("features", "words"), [(512, 2048), (2048, 1024)], ids=["resnet18", "resnet50"])
def test_a_classifier_takes_the_bytes_that_the_paper_counts(features: int, words: int) -> None:
    """Rows of 128 codes of 11 bits, or of 512 of 10 bits, are whole bytes: nothing is lost to the alignment."""
    assert 8 * coded_bytes(1000, features, words=words, width=4) == PaperLayer(1000 * features, 4, words).bits


def test_the_layer_tables_are_those_of_the_models() -> None:
    """Parameters of torchvision's ResNet-18 and ResNet-50."""
    for depth, parameters in ((18, 11_689_512), (50, 25_557_032)):
        layers, rest = counted(depth, "small")
        assert sum(layer.weights for layer in layers) + rest == parameters
