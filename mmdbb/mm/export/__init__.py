# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merged networks as ONNX, TorchScript and torch.export files."""
