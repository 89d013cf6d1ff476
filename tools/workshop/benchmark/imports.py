# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What ``import mmdbb`` takes beyond ``import torch``."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Dict, NamedTuple

#: Run after `import torch`, which each of them needs.
_CODE = """
import sys, time
start = time.perf_counter()
import torch
middle, worked = time.perf_counter(), time.process_time()
{setting}
import mmdbb
end = time.perf_counter()
print(middle - start, end - middle, time.process_time() - worked)
"""
#: Where mmdbb is imported -> how to make it so.
SETTINGS = {
    'without hosts': 'sys.modules.update(mmengine=None, mmcv=None)',
    'with mmengine and mmcv': '',
}


class ImportTime(NamedTuple):
    """Medians over fresh processes, in seconds.

    Attributes:
        torch: Of ``import torch``.
        mmdbb: Of ``import mmdbb`` after it.
        worked: Of that, what the process had the processor for; the rest it
            waited for files or for other processes.
    """

    torch: float
    mmdbb: float
    worked: float


def import_times(repeats: int) -> Dict[str, ImportTime]:
    """Measure imports, the settings in turn.

    Args:
        repeats: How many processes for each setting; one more warms the
            disk's cache.

    Returns:
        dict: The keys of :data:`SETTINGS` -> times.
    """
    found = {name: [] for name in SETTINGS}
    for round_ in range(repeats + 1):
        for name, setting in SETTINGS.items():
            run = subprocess.run(
                [sys.executable, '-c', _CODE.format(setting=setting)],
                check=True,
                capture_output=True,
                text=True,
            )
            if round_:
                line = run.stdout.splitlines()[-1]
                found[name].append([float(x) for x in line.split()])
    return {
        name: ImportTime(*map(statistics.median, zip(*seconds)))
        for name, seconds in found.items()
    }
