# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What writing INT8 files needs besides torch, and what to install."""

from __future__ import annotations

import importlib

from mmdbb.errors import UserError

PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')


def require_packages() -> None:
    """Raise early if a package is missing.

    Raises:
        UserError: It names the package and how to install it.
    """
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f'quantization needs {error.name or name}; install it with: '
                "pip install 'mmdbb[quantization]'"
            ) from error
