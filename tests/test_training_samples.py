"""Labelled batches: every image once an epoch, the same batch for the same step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import CALIBRATION, CONV, images

from vqonnx.errors import DataError, OptionError
from vqonnx.training.samples import Samples


@given(count=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_image_comes_once_an_epoch_with_its_label(count: int, batch: int, seed: int) -> None:
    x = images(count)
    samples = Samples(CONV, x, np.arange(count), batch=batch, seed=seed)
    steps = count // min(batch, count)
    seen = []
    for step in range(steps):
        feed, labels = samples(step)
        np.testing.assert_array_equal(feed["image"], x[labels])
        np.testing.assert_array_equal(samples(step)[1], labels)
        seen += labels.tolist()
    assert len(set(seen)) == len(seen) == steps * min(batch, count)


def test_epochs_differ_in_their_order() -> None:
    samples = Samples(CONV, CALIBRATION, np.arange(256), batch=128)
    assert samples.count == 256
    assert samples(0)[1].tolist() != samples(2)[1].tolist()


def test_labels_must_be_as_many_as_images() -> None:
    with pytest.raises(DataError, match="3 images and 2 labels; give one label for each image"):
        Samples(CONV, images(3), np.arange(2))


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(OptionError, match="batch is 0; choose 1 or more"):
        Samples(CONV, images(3), np.arange(3), batch=0)
