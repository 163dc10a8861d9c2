"""The exceptions of vqonnx.

::

    VqonnxError
    ├── InputError        what the user handed in cannot be used (model, calibration data, option, path)
    │   ├── ModelError        the model file is not readable, or nothing in it can be compressed
    │   ├── DataError         calibration or evaluation data do not fit the model
    │   └── OptionError       unknown method, option, pattern or value
    ├── FormError         arrays that do not fit together as a form
    └── VerifyError       the written model does not load, does not run, or differs too much

Every message is one line that names the thing, gives both numbers and says what to do.
"""

from __future__ import annotations


class VqonnxError(Exception):
    """Root of all errors that vqonnx raises on purpose."""


class InputError(VqonnxError):
    """What the user handed in cannot be used."""


class ModelError(InputError):
    """The model file is not readable, or nothing in it can be compressed."""


class DataError(InputError):
    """Calibration or evaluation data do not fit the model."""


class OptionError(InputError):
    """An unknown method, option, pattern or value."""


class FormError(VqonnxError):
    """Arrays that do not fit together as a form."""


class VerifyError(VqonnxError):
    """The written model does not load, does not run, or differs too much."""
