"""Some blocks merged, others left: a network of mmdbb's, from a config."""

import os

import mmdet.apis
import mmpretrain
import mmseg.apis
import pytest
import torch
from helpers import deploy, distance, image
from mmengine.config import Config
from mmengine.registry import MODELS
from networks import CONFIGS, write_checkpoint, write_config

import mmdbb  # noqa: F401
from mmdbb import load_deployed
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.stock.partial import (
    merge_some_,
    partial_config,
    select_blocks,
    whole_config,
)
from mmdbb.reparam import find_blocks

pytestmark = pytest.mark.usefixtures('quiet')
X = image(2, 3, 40, 56, dtype=torch.float32)
LOADERS = dict(
    classifier=lambda config, path: mmpretrain.get_model(config, path),
    detector=lambda config, path: mmdet.apis.init_detector(
        config, path, device='cpu', palette='random'
    ),
    segmentor=lambda config, path: mmseg.apis.init_model(
        config, path, device='cpu'
    ),
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Task -> config, checkpoint and the network that was trained."""
    found = {}
    for task in CONFIGS:
        folder = tmp_path_factory.mktemp(task)
        config = write_config(folder, task)
        checkpoint = write_checkpoint(config, folder / 'trained.pth')
        model = build_model(Config.fromfile(config))
        model.load_state_dict(torch.load(checkpoint)['state_dict'])
        found[task] = (config, checkpoint, model)
    return found


def run(trained, task, out, **options):
    config, checkpoint, _ = trained[task]
    return deploy(
        Config.fromfile(options.pop('config', config)),
        options.pop('checkpoint', checkpoint),
        str(out),
        image_size=(64, 48),
        **options,
    )


def merged_in(model):
    return sorted(n for n, b in find_blocks(model).items() if b.deploy)


@pytest.mark.parametrize('task', CONFIGS)
def test_only(trained, tmp_path, task):
    pattern = 'backbone.layer1.*'
    out = tmp_path / 'a.pth'
    result = run(trained, task, out, only=[pattern])
    _, _, model = trained[task]
    names = sorted(n for n in find_blocks(model) if n[:15] == pattern[:15])
    assert names and result.blocks == len(names)
    assert result.left == len(find_blocks(model)) - len(names) > 0
    assert result.structure == 'partial'
    before, after = result.parameters
    assert before > after
    loaded = read_checkpoint(str(out))
    assert loaded['meta']['mmdbb']['merged'] == names
    assert loaded['meta']['mmdbb']['structure'] == 'partial'
    # By our loader and by the host's own, which knows nothing of it.
    for load in (load_deployed, LOADERS[task]):
        found = load(result.config, result.checkpoint)
        found.train(False)
        assert type(found) is type(model)
        assert merged_in(found) == names
        for a, b in zip(found.extract_feat(X), model.extract_feat(X)):
            assert distance(a, b) < 1e-4


def test_skip_and_several_patterns(trained, tmp_path):
    result = run(
        trained,
        'classifier',
        tmp_path / 'a.pth',
        only=['*.layer1.0.*', '*.layer2.*'],
        skip=['*.conv2'],
    )
    assert merged_in(load_deployed(result.config, result.checkpoint)) == [
        'backbone.layer1.0.conv1',
        'backbone.layer2.0.conv1',
        'backbone.layer2.1.conv1',
    ]


def test_the_rest_is_merged_later(trained, tmp_path):
    _, _, model = trained['classifier']
    sizes = []
    config, checkpoint = trained['classifier'][:2]
    for i, patterns in enumerate((['*layer1*'], ['*.conv1'], ['*'])):
        result = run(
            trained,
            'classifier',
            tmp_path / f'{i}.pth',
            config=config,
            checkpoint=checkpoint,
            only=patterns,
        )
        config, checkpoint = result.config, result.checkpoint
        sizes.append((result.blocks, result.left, result.structure))
    assert sizes == [(4, 4, 'partial'), (2, 2, 'partial'), (2, 0, 'stock')]
    found = load_deployed(config, checkpoint)
    assert type(found.backbone).__name__ == 'ResNet'
    assert distance(found(X), model(X)) < 1e-4


def test_all_is_the_stock_network(trained, tmp_path):
    whole = run(trained, 'classifier', tmp_path / 'whole.pth')
    result = run(trained, 'classifier', tmp_path / 'a.pth', only=['*'])
    assert result.structure == 'stock' and not result.left
    states = [
        read_checkpoint(r.checkpoint)['state_dict'] for r in (whole, result)
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(only=['backbone.layer9.*']),
            r'--only backbone.layer9.\* fits no block; the blocks are '
            r'backbone.layer1.0.conv1, .* and 3 more',
        ),
        (dict(skip=['layer1']), '--skip layer1 fits no block'),
        (dict(skip=['*']), '--only and --skip leave no block to merge, of b'),
        (dict(only=['*1'], fuse=True), '--fuse .* does not go with blocks'),
    ],
)
def test_refused(trained, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(trained, 'classifier', tmp_path / 'a.pth', **options)
    assert os.listdir(tmp_path) == []


def test_select_takes_whole_names():
    blocks = dict.fromkeys(['a.conv1', 'a.conv10', 'A.conv1'])
    assert select_blocks(blocks) == list(blocks)
    assert select_blocks(blocks, ['a.conv1']) == ['a.conv1']
    assert select_blocks(blocks, ['a.*'], ['*0']) == ['a.conv1']


def test_config_and_back(trained):
    cfg = Config.fromfile(trained['classifier'][0])
    cfg.model.backbone.init_cfg = [
        dict(type='PlainPretrained', checkpoint='a.pth'),
        dict(type='Kaiming', layer='Conv2d'),
    ]
    cfg.load_from = 'a.pth'
    before = cfg.to_dict()
    found = partial_config(cfg, ['b', 'a'])
    assert cfg.to_dict() == before
    assert found.model.type == 'PartlyMerged'
    assert found.model.network_type == 'mmpretrain.ImageClassifier'
    assert found.model.merged == ['a', 'b'] and found.load_from is None
    # The host's tools look for the parts where they were.
    assert found.model.backbone.type == 'mmpretrain.ResNetDBB'
    assert [r.type for r in found.model.backbone.init_cfg] == ['Kaiming']
    back = whole_config(found)
    assert back.model.type == 'mmpretrain.ImageClassifier'
    assert 'merged' not in back.model and 'network_type' not in back.model
    assert whole_config(cfg) is cfg


def test_names_of_no_block():
    layer = dict(
        type='PartlyMerged',
        network_type='DBB',
        in_channels=3,
        out_channels=4,
        kernel_size=3,
    )
    assert MODELS.build(dict(layer, merged=[''])).deploy
    with pytest.raises(ValueError, match='no such blocks: a, b; the network'):
        MODELS.build(dict(layer, merged=['a', '', 'b']))
    with pytest.raises(ValueError, match='the network has none'):
        merge_some_(torch.nn.ReLU(), ['a'])
