# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Exporting: merged networks as ONNX, TorchScript and torch.export files."""

from mmdbb.mm.export.checkpoint import export_checkpoint
from mmdbb.mm.export.network import Exported, export_network
from mmdbb.mm.outputs import Proof, Source

__all__ = [
    'Exported',
    'Proof',
    'Source',
    'export_checkpoint',
    'export_network',
]
