# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fewer filters: penalties on merged kernels, and structural pruning.

``import mmdbb`` leaves this package out. The tools import it, and a config
that uses its hook lists ``mmdbb.prune`` in ``custom_imports``. Pruning needs
the extra ``pruning``; the penalties need nothing more.
"""
