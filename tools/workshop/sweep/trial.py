# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Try blocks in one architecture: build, train, start, merge, prove.

Each step is taken the way a user takes it, by mmdbb's public functions, and
its outcome noted. A step that fails ends nothing but itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import traceback
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmdbb import BlocksHook, load_plain_weights_
from mmdbb.compare import network_outputs
from mmdbb.deploy import (
    MergeOptions,
    Proof,
    Source,
    deploy_checkpoint,
    stock_config,
)
from mmdbb.errors import UserError
from mmdbb.modules import count_parameters
from mmdbb.proof import prove_equal
from mmdbb.reparam import find_blocks
from mmdbb.running import run_network

from .architectures import Architecture
from .inputs import images_for
from .networks import (
    build,
    model_config,
    narrow,
    parts_taking_blocks,
    with_blocks,
)
from .training import train

#: Largest difference allowed between a network that starts from plain weights
#: and the plain one, in float64.
TOLERANCE = 1e-6
#: Heights and widths of the images to try, in pixels: the first that the
#: network runs on is taken.
SIZES = (
    *((64, 64), (128, 128), (224, 224)),
    *((32, 96), (32, 32), (448, 448), (512, 512)),
)


class Trial:
    """One architecture, tried.

    Args:
        architecture: What to try.

    Attributes:
        row: What is found out, plain data. ``takes`` has the parts whose
            classes take ``conv_cfg``, ``refused`` those of them that cannot
            be built with a block, with the reason, ``blocks`` the number of
            blocks in each part that has some. ``steps`` has the outcome of
            each step that was taken: ``ok``, ``how`` and, where it failed,
            ``kind`` ('refused' for an error that the user can put right,
            'error' for any other) and ``reason``.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.row: Dict[str, Any] = dict(
            key=architecture.key,
            **architecture._asdict(),
            takes={},
            refused={},
            blocks={},
            steps={},
        )
        del self.row['path']

    def run(self) -> Dict[str, Any]:
        """Take all steps.

        Returns:
            dict: The row.
        """
        loaded = Config.fromfile(self.architecture.path)
        cfg = model_config(loaded, self.architecture.package)
        self.row['takes'] = parts_taking_blocks(cfg)
        if not self.row['takes']:
            return self.row
        with self._step('alone'):  # without blocks
            cfg, self.size = self._smallest(cfg)
        if not self.row['steps']['alone']['ok']:
            return self.row
        self.row['image_size'] = self.size
        with self._step('builds'):
            self.cfg = self._with_all_blocks(cfg)
            model = build(self.cfg)
            self._count_blocks(model)
        if not self.row['steps']['builds']['ok']:
            return self.row
        with self._step('says') as step:
            step['said'] = _said(self.cfg, model)
        if not self.row['blocks']:
            return self.row
        self.row['parameters'] = count_parameters(model)
        with self._step('trains') as step:
            step['how'] = train(model, self.size, self.architecture.package)
        with self._step('starts') as step:
            step['how'] = self._start()
        with self._step('merges') as step:
            step.update(self._merge(MergeOptions()))
        if not step['ok']:
            # A way out that every trained network has to have.
            with self._step('fuses') as step:
                step.update(self._merge(MergeOptions(fuse=True)))
        return self.row

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[dict]:
        step: Dict[str, Any] = dict(ok=False)
        self.row['steps'][name] = step
        try:
            yield step
            step['ok'] = True
        except (UserError, ValueError) as error:
            step.update(kind='refused', reason=_one_line(error))
            if not isinstance(error, UserError) and not _is_own(error):
                step.update(kind='error', where=_where(error))
        except Exception as error:
            step.update(
                kind='error', reason=_one_line(error), where=_where(error)
            )

    def _smallest(self, cfg: Config) -> Tuple[Config, Optional[list]]:
        """A quarter of the width, if the network then builds and runs."""
        for embeddings in (True, False):
            with contextlib.suppress(Exception):  # what does not fit together
                quarter = narrow(cfg, embeddings)
                model = build(quarter)
                size = _size_for(model)
                if size is not None and _fits(model, size):
                    self.row['narrow'] = True
                    return quarter, size
        self.row['narrow'] = False
        return cfg, _size_for(build(cfg))

    def _with_all_blocks(self, cfg: Config) -> Config:
        """Blocks in all parts, but in those that cannot be built with them."""
        places = list(self.row['takes'])
        try:
            build(with_blocks(cfg, places))
        except Exception as error:
            whole = _one_line(error)
        else:
            return with_blocks(cfg, places)
        good: List[str] = []
        for place in places:
            try:
                build(with_blocks(cfg, [place]))
            except Exception as error:
                self.row['refused'][place] = _one_line(error)
            else:
                good.append(place)
        if not self.row['refused'] or not good:
            raise UserError(whole)
        return with_blocks(cfg, good)

    def _count_blocks(self, model: nn.Module) -> None:
        counts: Dict[str, int] = {}
        for name in find_blocks(model):
            part = name.partition('.')[0]
            counts[part] = counts.get(part, 0) + 1
        self.row['blocks'] = counts

    def _start(self) -> str:
        """Start from the stock network's weights, and compare the two."""
        plain = build(stock_config(self.cfg)).double()
        model = build(self.cfg).double()
        load_plain_weights_(model, plain.state_dict())
        try:
            found = prove_equal(model, plain, self._batches(model), TOLERANCE)
        except UserError as error:
            said = str(error).replace('the merged network', 'the start')
            raise ValueError(said.partition(';')[0]) from error
        return f'{found.largest:.0e} in {found.output}'

    def _merge(self, options: MergeOptions) -> dict:
        """Deploy a checkpoint, as ``tools/reparam.py`` does."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = os.path.join(folder, 'trained.pth')
            state = build(self.cfg).state_dict()
            torch.save(dict(state_dict=state, meta={}), checkpoint)
            result = deploy_checkpoint(
                Source(self.cfg, checkpoint),
                os.path.join(folder, 'merged.pth'),
                options,
                proof=Proof(image_size=tuple(self.size or SIZES[0])),
            )
        return dict(
            how=f'{result.difference.largest:.0e}',
            merged=result.blocks,
            compared=len(result.difference.compared),
            left_out=dict(result.difference.left_out),
        )

    def _batches(self, model: nn.Module) -> List[Tensor]:
        return [images_for(model, tuple(self.size or SIZES[0])).double()]


def _said(cfg: Config, model: nn.Module) -> List[str]:
    """What the start of a training warns of: the lines of ``BlocksHook``.

    Raises:
        UserError: If it refuses the network.
    """
    lines: List[str] = []
    logger = SimpleNamespace(info=lambda _: None, warning=lines.append)
    runner = SimpleNamespace(cfg=cfg, model=model, logger=logger)
    BlocksHook().say(runner)
    return lines


def _size_for(model: nn.Module) -> Optional[list]:
    """The first size of images on which a network runs, None if on none."""
    for size in SIZES:
        with contextlib.suppress(Exception), torch.no_grad():
            network_outputs(model, images_for(model, size))
            return list(size)
    return None


def _fits(model: nn.Module, size: list) -> bool:
    """Whether the heads of a narrow network read as many channels as come."""
    with torch.no_grad():
        found = run_network(model, images_for(model, size), once=True)
    return not any(map(_MISFIT.search, found.left_out.values()))


#: What torch says of tensors that do not fit together.
_MISFIT = re.compile(
    r'cannot be multiplied|expected input|must match|normalized_shape'
)


def _one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    if not isinstance(error, (UserError, ValueError)):
        text = f'{type(error).__name__}: {text}'
    return text[:400]


def _is_own(error: BaseException) -> bool:
    """Whether mmdbb raised an error, and not what it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and '/mmdbb/' in frames[-1].filename


def _where(error: BaseException) -> str:
    """Where an error was raised: the last frames, from the caller on."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return ' > '.join(
        f'{os.path.basename(f.filename)}:{f.lineno} {f.name}' for f in frames
    )
