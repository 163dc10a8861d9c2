"""Make ONNX models 8 to 30 times smaller by vector quantisation, run them on onnxruntime, prove that they agree."""

from vqonnx.analysis import LayerAnalysis, analyze
from vqonnx.compact_file import Compacted, compact_file
from vqonnx.compress import compress
from vqonnx.errors import DataError, FormError, InputError, ModelError, OptionError, VerifyError, VqonnxError
from vqonnx.expand import expand
from vqonnx.fit import Limits
from vqonnx.fuse import FusedFile, fuse
from vqonnx.methods import (
    BGD,
    DQC,
    METHODS,
    PQ,
    RTN,
    SVD,
    Best,
    Binary,
    Entropy,
    KMeans,
    Refined,
    Residual,
    Settled,
    Transform,
)
from vqonnx.plan import Override
from vqonnx.published import Imported, import_kill_the_bits
from vqonnx.report import Report, report
from vqonnx.result import Result, Saved
from vqonnx.runtime import get_library_path
from vqonnx.verify import Comparison, compare

__all__ = [
    "BGD",
    "DQC",
    "METHODS",
    "PQ",
    "RTN",
    "SVD",
    "Best",
    "Binary",
    "Compacted",
    "Comparison",
    "DataError",
    "Entropy",
    "FormError",
    "FusedFile",
    "Imported",
    "InputError",
    "KMeans",
    "LayerAnalysis",
    "Limits",
    "ModelError",
    "OptionError",
    "Override",
    "Refined",
    "Report",
    "Residual",
    "Result",
    "Saved",
    "Settled",
    "Transform",
    "VerifyError",
    "VqonnxError",
    "analyze",
    "compact_file",
    "compare",
    "compress",
    "expand",
    "fuse",
    "get_library_path",
    "import_kill_the_bits",
    "report",
]
