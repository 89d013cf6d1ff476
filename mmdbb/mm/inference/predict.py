# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Predict one image, by a network in PyTorch or in an ONNX file.

The OpenMMLab package does everything around the network in either case: it
reads and resizes the image as its config tests, and decodes the outputs.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Optional

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from mmdbb.files.checkpoints import check_regular, read_checkpoint
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.engine.data_paths import dataset_configs
from mmdbb.mm.inference.onnx_files import predict_by_file
from mmdbb.mm.inference.picture import check_ending, draw
from mmdbb.mm.inference.pipeline import TestPipeline
from mmdbb.mm.outputs import Source
from mmdbb.mm.quantization.network import fill_network


def predict(
    source: Source,
    image: str,
    out: Optional[str] = None,
    min_score: float = 0.3,
    device: str = 'cpu',
    overwrite: bool = False,
) -> BaseDataElement:
    """Predict the class, the boxes or the segments of one image.

    Args:
        source: A checkpoint of the network, trained, deployed, pruned or
            trained for INT8, or an ONNX file of it; and its config. ONNX
            files of detectors are those exported with boxes, or with the
            dense head of a single-stage detector.
        image: Path of the image.
        out: Path of a picture with the prediction drawn on it, ``*.png`` or
            ``*.jpg``; None for no picture.
        min_score: Boxes of a lower score are not drawn, between 0 and 1. All
            are in the result.
        device: Device that a network in PyTorch runs on. ONNX files run on
            the CPU.
        overwrite: Whether ``out`` may be replaced.

    Returns:
        BaseDataElement: The OpenMMLab package's data sample, with
        ``pred_label`` and ``pred_score``, ``pred_instances`` in pixels of the
        image, or ``pred_sem_seg``. ``classes`` of its ``metainfo`` has the
        names of the classes, or None.

    Raises:
        UserError: If a file is missing or cannot be read, the checkpoint does
            not fit the config, or the picture cannot be written.
    """
    image, cfg = os.fspath(image), source.config
    _check_image(image)
    if out is not None:
        check_ending(out)
    outputs = [] if out is None else [os.fspath(out)]
    for path in outputs:
        if os.path.realpath(path) in map(
            os.path.realpath, (image, source.checkpoint)
        ):
            raise UserError(f'output {path} is also an input')
    scope = cfg.get('default_scope')
    with contextlib.ExitStack() as stack:
        drafts = []
        if outputs:
            drafts = stack.enter_context(
                all_or_nothing(*outputs, overwrite=overwrite)
            )
        stack.enter_context(DefaultScope.overwrite_default_scope(scope))
        pipeline = TestPipeline(cfg, image)
        if source.checkpoint.endswith('.onnx'):
            meta, sample = {}, predict_by_file(cfg, source, pipeline)
        else:
            loaded = read_checkpoint(
                source.checkpoint, source.ema, source.unsafe
            )
            meta = loaded['meta']
            sample = _predict(cfg, source, loaded, pipeline, device)
        _name_classes(sample, cfg, meta)
        for draft in drafts:
            draw(sample, image, draft, cfg, min_score)
    return sample


def _check_image(path: str) -> None:
    if not os.path.exists(path) or os.path.isdir(path):
        raise UserError(f'no such image: {path}')
    check_regular(path, 'image')


@torch.no_grad()
def _predict(
    cfg: Any, source: Source, loaded: dict, pipeline: TestPipeline, device: str
) -> BaseDataElement:
    model = fill_network(build_model(cfg), loaded, source.checkpoint)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device {device}: {error}') from error
    return model.test_step(pseudo_collate([pipeline()]))[0].cpu()


def _name_classes(sample: BaseDataElement, cfg: Any, meta: dict) -> None:
    """Note the names of the classes, and their colours, in a sample."""
    found = next(dataset_configs(cfg, ('test_dataloader',)), None)
    known = dict(getattr(found and found.kind, 'METAINFO', None) or {})
    # The training knew best: a data set may read its classes from folders.
    known.update(meta.get('dataset_meta') or {})
    known.update((found and found.cfg.get('metainfo')) or {})
    sample.set_metainfo(
        dict(classes=known.get('classes'), palette=known.get('palette'))
    )
