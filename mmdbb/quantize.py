# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Quantizing: INT8 files after training, and training for INT8."""

from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.outputs import Source
from mmdbb.mm.quantization.insert_bn import Inserted, insert_bn_checkpoint
from mmdbb.mm.quantization.ptq import (
    Quantized,
    QuantizeOptions,
    quantize_checkpoint,
)
from mmdbb.mm.quantization.qat import QATHook, prepare_qat_
from mmdbb.mm.quantization.ranges import KernelRange

__all__ = [
    'Calibration',
    'Inserted',
    'KernelRange',
    'QATHook',
    'QuantizeOptions',
    'Quantized',
    'Source',
    'insert_bn_checkpoint',
    'prepare_qat_',
    'quantize_checkpoint',
]
