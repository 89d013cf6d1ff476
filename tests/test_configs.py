"""Every config builds, trains a step and merges into the same function."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch.nn.modules.batchnorm import _BatchNorm

import mmdbb
from mmdbb.blocks.base import ReparamConv2d

ROOT = Path(__file__).resolve().parents[1] / 'configs'
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.rglob('*.py')
    if '_base_' not in path.parts
)
HEIGHT, WIDTH = 64, 96  # pixels
HEADS = ('decode_head', 'auxiliary_head', 'bbox_head', 'rpn_head')


def classification_sample(model):
    from mmpretrain.structures import DataSample

    classes = model.head.num_classes
    return DataSample().set_gt_label(torch.randint(classes, (1,)).item())


def detection_sample(_):
    from mmdet.structures import DetDataSample

    sample = DetDataSample(
        metainfo=dict(
            img_shape=(HEIGHT, WIDTH),
            ori_shape=(HEIGHT, WIDTH),
            pad_shape=(HEIGHT, WIDTH),
            scale_factor=(1.0, 1.0),
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[4.0, 8.0, 36.0, 48.0], [30.0, 5.0, 80.0, 40.0]]),
        labels=torch.tensor([1, 2]),
    )
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
    )
    return sample


def segmentation_sample(model):
    from mmseg.structures import SegDataSample

    classes = model.decode_head.num_classes
    sample = SegDataSample(
        metainfo=dict(
            img_shape=(HEIGHT, WIDTH),
            ori_shape=(HEIGHT, WIDTH),
        )
    )
    sample.gt_sem_seg = PixelData(
        data=torch.randint(classes, (1, HEIGHT, WIDTH))
    )
    return sample


SAMPLES = dict(
    mmpretrain=classification_sample,
    mmdet=detection_sample,
    mmseg=segmentation_sample,
)


@pytest.fixture(params=CONFIGS)
def config(request):
    config = Config.fromfile(ROOT / request.param)
    # What Runner does with the config's default scope.
    DefaultScope.get_instance(request.param, scope_name=config.default_scope)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        yield config


def tensors(outputs):
    """Flatten a tensor or nested tuples and lists of tensors."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in tensors(part)]


@torch.no_grad()
def outputs_of(model, image):
    features = model.backbone(image)
    if getattr(model, 'neck', None) is not None:
        features = model.neck(features)
    found = tensors(features)
    for name in HEADS:
        # Before a head's own post-processing.
        head = getattr(model, name, None)
        if head is not None:
            found += tensors(head(features))
    return found


@torch.no_grad()
def randomize_norms(model, generator):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.uniform_(-1, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)


def test_config(config):
    torch.manual_seed(0)
    if config.model.get('data_preprocessor', {}).get('size'):
        config.model.data_preprocessor.size = (HEIGHT, WIDTH)
    model = MODELS.build(config.model)
    model.init_weights()
    # SyncBN trains on GPUs only.
    model = revert_sync_batchnorm(model)

    make_sample = SAMPLES[config.default_scope]
    batch = dict(
        inputs=[
            torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
            for _ in range(2)
        ],
        data_samples=[make_sample(model) for _ in range(2)],
    )
    optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
    first = next(model.backbone.parameters())
    before = first.clone()
    model.train()
    losses = model.train_step(batch, optim_wrapper)
    assert torch.isfinite(losses['loss'])
    assert not torch.equal(first, before)

    generator = torch.Generator().manual_seed(1)
    randomize_norms(model, generator)
    model.double().eval()
    image = torch.randn(
        1, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64
    )
    expected = outputs_of(model, image)
    blocks = [m for m in model.modules() if isinstance(m, ReparamConv2d)]
    merged = mmdbb.reparameterize(model, inplace=True)
    assert blocks
    assert not any(isinstance(m, ReparamConv2d) for m in merged.modules())
    for want, have in zip(expected, outputs_of(merged, image)):
        error = (want - have).abs().max() / want.abs().max()
        assert error < 1e-10
