# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The registry of branches.

Blocks are registered where convolution layers are: in mmengine's root
``MODELS``, so that a bare ``type='DBB'`` works in every child scope.
"""

from mmengine.registry import Registry

BRANCHES = Registry('branch')
