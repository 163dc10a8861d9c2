"""The configuration file: what it says arrives, and what it should not say is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import pytest

import vqonnx
from vqonnx.compress import Override
from vqonnx.config import Config, read_config
from vqonnx.errors import OptionError
from vqonnx.methods import BGD, PQ, KMeans


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str | bytes) -> Path:
        path = tmp_path / "config.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return written


def test_everything_at_once(write: Any) -> None:
    text = """
        method = "bgd"
        options = { bits = 6, blocks = "large" }
        target = "portable"
        seed = 7
        include = ["features.*"]
        exclude = ["*.classifier.*", "head"]
        op_types = ["Conv", "Gemm"]

        [[layer]]
        match = "layer4.*"
        method = "pq"
        options = { width = 4, codebook = "float32" }

        [[layer]]
        match = "*.downsample.*"
        method = "none"

        [[layer]]
        match = "fc"
        method = "bgd"
        options = { width = "auto", first = true }
    """
    assert read_config(write(text)) == Config(
        method="bgd",
        options={"bits": 6, "blocks": "large"},
        target="portable",
        seed=7,
        include=("features.*",),
        exclude=("*.classifier.*", "head"),
        op_types=("Conv", "Gemm"),
        overrides=(
            Override("layer4.*", PQ(width=4, codebook="float32")),
            Override("*.downsample.*", None),
            Override("fc", BGD(width=None, first=True)),
        ),
    )


def test_nothing_is_needed(write: Any) -> None:
    assert read_config(write("")) == Config()
    assert read_config(str(write("# only a comment"))) == Config()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("metod = 'pq'", "key 'metod' is unknown; the keys are method, options, .* and \\[\\[layer\\]\\]"),
        ("method = 3", "method = 3 should be a str"),
        ("options = 'bits=4'", "options = 'bits=4' should be a dict"),
        ("seed = 'one'", "seed = 'one' should be a int"),
        ("seed = 1.5", "seed = 1.5 should be a int"),
        ("include = 'conv*'", "include = 'conv\\*' should be a list"),
        ("exclude = [3]", "exclude holds 3; it should be a list of texts"),
        ("op_types = ['Conv', ['Gemm']]", "op_types holds \\['Gemm'\\]"),
        ("layer = 'fc'", "layer = 'fc' should be a list"),
        ("layer = ['fc']", "number 1 needs a key 'match'"),
        ("[layer]\nmatch = 'fc'", "should be a list"),
        ("[[layer]]\nmethod = 'pq'", "number 1 needs a key 'match'"),
        ("[[layer]]\nmatch = 3\nmethod = 'pq'", "number 1 needs a key 'match'"),
        ("[[layer]]\nmatch = 'a'\nmethod = 'pq'\n[[layer]]\nmatch = 'fc'\nbits = 3", "number 2: key 'bits' is unknown"),
        (
            "[[layer]]\nmatch = 'fc'\noptions = { bits = 2 }",
            "number 1 needs a key 'method': one of kmeans, rtn, pq, bgd, .* or",
        ),
        ("[[layer]]\nmatch = 'fc'\nmethod = 'pq'\noptions = 3", "options = 3 should be a dict"),
        ("[[layer]]\nmatch = 'fc'\nmethod = 'qp'", "method 'qp' is unknown; choose one of kmeans, rtn, pq, bgd"),
        ("[[layer]]\nmatch = 'fc'\nmethod = 'pq'\noptions = { with = 2 }", "'pq' has no option 'with'; it has .*width"),
        ("[[layer]]\nmatch = 'fc'\nmethod = 'pq'\noptions = { bits = 13 }", "bits is 13; choose 1 to 12"),
        ("[[layer]]\nmatch = 'fc'\nmethod = 'pq'\noptions = { bits = 2.5 }", "bits=2.5 is not a whole number"),
        ("[[layer]]\nmatch = 'fc'\nmethod = 'pq'\noptions = { bits = [2] }", "is not a whole number"),
        ("method = ", "is not TOML"),
        ("method = 'pq'\nmethod = 'pq'", "is not TOML"),
        (b"\xff\xfe\x00", "is not TOML"),
    ],
)
def test_what_cannot_be_used_is_named(text: str | bytes, says: str, write: Any) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        read_config(write(text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(OptionError, match=r"cannot be read \(.*\); give the path of a TOML file"):
            read_config(path)


def test_the_first_pattern_that_matches_wins(write: Any, tmp_path: Path) -> None:
    config = read_config(
        write(
            """
            [[layer]]
            match = "conv*"
            method = "none"
            [[layer]]
            match = "*_w"
            method = "kmeans"
            options = { bits = 1 }
            [[layer]]
            match = "fc"
            method = "kmeans"
            options = { bits = 5 }
            """
        )
    )
    source = nets.write(nets.mixed(), tmp_path / "m.onnx")
    result = vqonnx.compress(source, KMeans(bits=3), overrides=config.overrides)
    assert {layer.options["bits"] for layer in result.layers} == {1}
    assert ("conv_w", "left alone by the configuration") in [(entry.name, entry.reason) for entry in result.skipped]
