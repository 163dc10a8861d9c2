"""Make ONNX models 8 to 30 times smaller by vector quantisation, run them on onnxruntime, prove that they agree."""

from vqonnx.compress import Override, Result, Saved, compress
from vqonnx.errors import DataError, FormError, InputError, ModelError, OptionError, VerifyError, VqonnxError
from vqonnx.methods import BGD, METHODS, PQ, KMeans
from vqonnx.runtime import get_library_path
from vqonnx.verify import Comparison, compare

__all__ = [
    "BGD",
    "METHODS",
    "PQ",
    "Comparison",
    "DataError",
    "FormError",
    "InputError",
    "KMeans",
    "ModelError",
    "OptionError",
    "Override",
    "Result",
    "Saved",
    "VerifyError",
    "VqonnxError",
    "compare",
    "compress",
    "get_library_path",
]
