# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What tools/reparam.py takes for a large network: seconds and memory.

  python docs/figures/merge_cost.py configs/resnet101_dbb_rerun_imagenet.py

makes a checkpoint of the config's network in a process of its own, then
merges, writes and verifies as the tool does. Linux only, whose unit of
``ru_maxrss`` is the KiB.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAKE = """
import sys
import torch
from mmengine.config import Config
from mmdbb.mm.deploy.load import build_model

model = build_model(Config.fromfile(sys.argv[1]))
torch.save(dict(state_dict=model.state_dict()), sys.argv[2])
"""


def peak():
    """The largest size that this process had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main(config):
    import mmpretrain.models  # noqa: F401
    import torch
    from mmengine.config import Config

    import mmdbb.mm.backbones  # noqa: F401
    from mmdbb.deploy import Source, deploy_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / 'trained.pth'
        subprocess.run(
            [sys.executable, '-c', MAKE, config, source], check=True
        )
        size = source.stat().st_size / 1e6
        before, start = peak(), time.perf_counter()
        worked = time.process_time()
        result = deploy_checkpoint(
            Source(Config.fromfile(config), str(source)), f'{folder}/out.pth'
        )
        seconds, added = time.perf_counter() - start, peak() - before
        worked = time.process_time() - worked
    print(
        f'{result.blocks} blocks, {torch.get_num_threads()} threads: '
        f'{seconds:.1f} s ({worked:.1f} s of processor time); '
        f'checkpoint {size:.0f} MB, memory {added:.0f} MB, '
        f'{added / size:.2f} times the checkpoint'
    )


if __name__ == '__main__':
    main(sys.argv[1])
