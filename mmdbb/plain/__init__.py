# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Start blocks from plain weights, so that outputs in eval mode stay the same.

:mod:`~mmdbb.plain.kernels` solves for a composed kernel,
:mod:`~mmdbb.plain.branch_sums` for a sum of branches;
:mod:`~mmdbb.plain.blocks` starts a block of either kind, and
:mod:`~mmdbb.plain.weights` all blocks of a network.
"""
