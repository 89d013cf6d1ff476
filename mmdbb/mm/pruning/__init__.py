# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fewer filters: penalties on merged kernels, and structural pruning.

Imported on its own, by the tools or by ``custom_imports`` of a config that
uses its hook. Pruning needs the extra ``pruning``.
"""
