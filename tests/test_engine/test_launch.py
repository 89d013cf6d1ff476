"""What differs between the hosts: drawing and test-time augmentation."""

from argparse import Namespace
from pathlib import Path

import mmcv
import numpy as np
import pytest
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS, MODELS, VISUALIZERS, DefaultScope

import mmdbb  # noqa: F401
from mmdbb.errors import UserError
from mmdbb.mm.engine import launch

ROOT = Path(__file__).resolve().parents[2] / 'configs/demo'
CONFIGS = {
    'mmpretrain': 'resnet18_dbb_mnist5k.py',
    'mmdet': 'resnet18_dbb_digits_coco.py',
    'mmseg': 'resnet18_dbb_digits_cityscapes.py',
}


@pytest.fixture(params=CONFIGS)
def config(request):
    config = Config.fromfile(ROOT / CONFIGS[request.param])
    DefaultScope.get_instance('launch', scope_name=config.default_scope)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        yield config


def drawing(folder):
    return Namespace(
        show=False, show_dir=str(folder), wait_time=1.0, interval=1
    )


def test_drawing_fits_the_hosts_hook(config, tmp_path):
    launch._enable_drawing(config, drawing(tmp_path / 'drawn'))
    VISUALIZERS.build(dict(config.visualizer, name='test_launch'))
    hook = HOOKS.build(config.default_hooks.visualization)
    assert getattr(hook, 'draw', None) or getattr(hook, 'enable', None)
    assert str(tmp_path) in str(
        [config.default_hooks.visualization, config.visualizer]
    )


def test_drawing_needs_a_hook(config, tmp_path):
    del config.default_hooks['visualization']
    with pytest.raises(UserError, match='default_hooks.visualization'):
        launch._enable_drawing(config, drawing(tmp_path))


def test_dump_is_registered(config, tmp_path):
    kind = launch._package(config).dump
    metric = METRICS.build(
        dict(type=kind, out_file_path=str(tmp_path / 'out.pkl'))
    )
    assert type(metric).__name__ == kind.split('.')[-1]


def test_tta_builds_and_augments(config, tmp_path):
    if config.default_scope == 'mmseg' and 'tta_model' not in config:
        with pytest.raises(UserError, match='tta_model'):
            launch._enable_tta(config)
        return
    launch._enable_tta(config)
    model = MODELS.build(config.model)
    assert type(model).__name__.endswith('TTA') or 'TTA' in str(type(model))
    path = tmp_path / 'image.png'
    image = np.random.default_rng(0).integers(256, size=(28, 28, 3))
    mmcv.imwrite(image.astype(np.uint8), str(path))
    pipeline = [
        transform
        for transform in config.test_dataloader.dataset.pipeline
        if not transform.type.startswith('LoadAnn')
    ]
    results = Compose(pipeline)(
        dict(
            img_path=str(path),
            img_id=0,
            gt_label=1,
            seg_fields=[],
            reduce_zero_label=False,
        )
    )
    # The image and its mirror image, at one scale or more.
    assert len(results['inputs']) >= 2
    widths = {tuple(inputs.shape) for inputs in results['inputs']}
    assert all(shape[0] == 3 for shape in widths)
    first, *others = results['inputs']
    assert any(
        other.shape == first.shape and (other.flip(-1) == first).all()
        for other in others
    )


def test_wrapped_dataset_is_augmented():
    config = Config.fromfile(ROOT / CONFIGS['mmdet'])
    dataset = config.test_dataloader.dataset
    config.test_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=dataset
    )
    launch._enable_tta(config)
    pipeline = config.test_dataloader.dataset.dataset.pipeline
    assert pipeline[-1].type == 'TestTimeAug'
    pack = pipeline[-1].transforms[-1][0]
    assert {'flip', 'flip_direction'} <= set(pack.meta_keys)


@pytest.mark.parametrize('kind', ['ApexOptimWrapper', 'MyOptimWrapper'])
def test_amp_takes_the_place_of_the_plain_wrapper_only(kind):
    config = Config(dict(optim_wrapper=dict(type=kind)))
    with pytest.raises(UserError, match=kind):
        launch._enable_amp(config)


def test_other_packages_of_the_family_are_welcome():
    config = Config(dict(default_scope='mmpose'))
    assert launch._package(config) is launch.OTHERS
