# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Quantizing: INT8 files after training, and training for INT8."""

from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.evaluation.metric import Metric
from mmdbb.mm.outputs import Source
from mmdbb.mm.quantization.fake import remove_quantizers_, set_quantizing_
from mmdbb.mm.quantization.insert_bn import Inserted, insert_bn_checkpoint
from mmdbb.mm.quantization.post_training import QuantizeOptions
from mmdbb.mm.quantization.ptq import Quantized, quantize_checkpoint
from mmdbb.mm.quantization.qat import QATHook, prepare_qat_
from mmdbb.mm.quantization.ranges import KernelRange, kernel_ranges
from mmdbb.mm.quantization.sensitivity import (
    LayerError,
    Sensitivity,
    report_sensitivity,
)

__all__ = [
    'Calibration',
    'Inserted',
    'KernelRange',
    'LayerError',
    'Metric',
    'QATHook',
    'QuantizeOptions',
    'Quantized',
    'Sensitivity',
    'Source',
    'insert_bn_checkpoint',
    'kernel_ranges',
    'prepare_qat_',
    'quantize_checkpoint',
    'remove_quantizers_',
    'report_sensitivity',
    'set_quantizing_',
]
