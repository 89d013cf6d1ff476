# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Predict by a network in an ONNX file."""

from __future__ import annotations

import os

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from mmdbb.errors import UserError, require_packages
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.evaluation.substitutes import running_instead
from mmdbb.mm.export.modules import FEATURE_READERS, is_detector
from mmdbb.mm.inference.pipeline import TestPipeline
from mmdbb.mm.outputs import Source
from mmdbb.mm.quantization.session import OnnxNetwork

#: Outputs of a file that has boxes.
BOXES = ['dets', 'labels']


@torch.no_grad()
def predict_by_file(
    cfg: Config, source: Source, pipeline: TestPipeline
) -> BaseDataElement:
    """Predict an image by the network in an ONNX file.

    Args:
        cfg: The network's config. Its own network is built, but not run.
        source: The source, whose checkpoint is the file.
        pipeline: Reads the image.

    Returns:
        BaseDataElement: The OpenMMLab package's data sample.

    Raises:
        UserError: If ONNX Runtime cannot run the file, the file lacks the
            outputs that a prediction needs, or the image is not of its size.
    """
    require_packages('predicting by an ONNX file', 'formats', 'onnxruntime')
    if not os.path.isfile(source.checkpoint):
        raise UserError(f'no such ONNX file: {source.checkpoint}')
    network = OnnxNetwork(source.checkpoint)
    model = build_model(cfg).eval()
    if network.names == BOXES:
        return _boxes(model, network, pipeline)
    if is_detector(model):
        _check_maps(model, network)
        data = pipeline.within(network.size)
    elif hasattr(model, 'decode_head'):
        data = pipeline.exactly(network.size)
    else:
        data = pipeline()
        size = tuple(data['inputs'].shape[-2:])
        if size != network.size:
            raise UserError(
                f'{network.path} takes images of {network.size} pixels, but '
                f'the test pipeline gives {size}; export it with '
                f'--image-size {size[0]} {size[1]}'
            )
    with running_instead(model, network):
        return model.test_step(pseudo_collate([data]))[0]


def _check_maps(model: nn.Module, network: OnnxNetwork) -> None:
    two_stages = any(
        isinstance(getattr(model, name, None), nn.Module)
        for name in FEATURE_READERS
    )
    features = all(name.startswith('feature') for name in network.names)
    if two_stages or features:
        raise UserError(
            f'{network.path} has the outputs {", ".join(network.names)}, '
            'which are no boxes; export the detector with tools/reparam.py '
            '--format onnx --boxes'
        )


def _boxes(
    model: nn.Module, network: OnnxNetwork, pipeline: TestPipeline
) -> BaseDataElement:
    data = pseudo_collate([pipeline.within(network.size)])
    data = model.data_preprocessor(data, False)
    dets, labels = (values[0] for values in network(data['inputs']))
    there = labels >= 0
    dets, labels = dets[there], labels[there]
    sample = data['data_samples'][0]
    height, width = sample.img_shape[:2]
    # What the file took for image, but is padding.
    limits = dets.new_tensor([width, height, width, height])
    boxes = torch.minimum(dets[:, :4], limits)
    scale = boxes.new_tensor(sample.get('scale_factor', (1.0, 1.0))).repeat(2)
    sample.pred_instances = InstanceData(
        bboxes=boxes / scale, scores=dets[:, 4], labels=labels
    )
    return sample
