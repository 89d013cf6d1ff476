# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The upper storey: what needs mmengine, mmcv and OpenMMLab's packages.

Whatever is below :mod:`mmdbb` and not in here needs torch only.
"""

from mmdbb.mm.hosts import require

# Else each module would complain of the first package that it misses.
require('mmengine', 'mmcv')
