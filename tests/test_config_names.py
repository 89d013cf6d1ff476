"""A config's name says what is in it: docs/recipes.md, "Names of configs"."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmdbb.mm.backbones  # noqa: F401
from mmdbb.mm.stock.config import stock_config

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(
    r'(?P<backbone>[a-z]+\d*(-\w+?)?)'
    r'_(?P<block>plain|acb|dbb|dbbconv|orepa|repvgg)'
    r'(_(?P<rerun>rerun))?'
    r'(_(?P<start>from_plain|scratch))?'
    r'(_(?P<network>centernet|retinanet|deeplabv3plus))?'
    r'_(?P<dataset>imagenet|cifar10|cifar100|coco|cityscapes)'
)
DEMO = re.compile(
    r'(?P<network>resnet18_dbb|repvgg)'
    r'_(?P<dataset>mnist5k|digits_coco|digits_cityscapes)'
    r'(_(?P<added>group_lasso|insert_bn|qat))?'
)
NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
DEMOS = sorted(path.stem for path in (ROOT / 'configs' / 'demo').glob('*.py'))
DOWNSTREAM = [n for n in NAMES if n.endswith(('_coco', '_cityscapes'))]
pytestmark = pytest.mark.usefixtures('quiet')

#: Backbone in a name -> the kind of network, and fields that say which.
BACKBONES = {
    'alexnet': ('AlexNet', {}),
    'mobilenet': ('MobileNetV1', {}),
    'repvgg-a0': ('RepVGG', dict(arch='A0')),
    'repvgg-a1': ('RepVGG', dict(arch='A1')),
    'repvgg-a2': ('RepVGG', dict(arch='A2')),
    'repvgg-b0': ('RepVGG', dict(arch='B0')),
    'repvgg-b1': ('RepVGG', dict(arch='B1')),
    'resnet18': ('ResNet', dict(depth=18)),
    'resnet34': ('ResNet', dict(depth=34)),
    'resnet50': ('ResNet', dict(depth=50)),
    'resnet101': ('ResNet', dict(depth=101)),
    'resnext50': ('ResNeXt', dict(depth=50)),
    'vgg16': ('VGG', dict(depth=16)),
    'wideresnet18-1d5x': (
        'ResNet',
        dict(depth=18, base_channels=96, stem_channels=96),
    ),
    'wideresnet18-2x': (
        'ResNet',
        dict(depth=18, base_channels=128, stem_channels=128),
    ),
}
#: Data set and network in a name -> the types of the model and of its head.
NETWORKS = {
    ('coco', None): ('FasterRCNN', 'StandardRoIHead'),
    ('coco', 'centernet'): ('CenterNet', 'CenterNetHead'),
    ('coco', 'retinanet'): ('RetinaNet', 'RetinaHead'),
    ('cityscapes', None): ('EncoderDecoder', 'PSPHead'),
    ('cityscapes', 'deeplabv3plus'): (
        'EncoderDecoder',
        'DepthwiseSeparableASPPHead',
    ),
}
DATASETS = dict(
    imagenet='ImageNet',
    cifar10='CIFAR10',
    cifar100='CIFAR100',
    coco='CocoDataset',
    cityscapes='CityscapesDataset',
)
BLOCKS = dict(ACB='acb', DBB='dbb', OREPA='orepa', RepVGGConv='repvgg')


def parts_of(name):
    match = NAME.fullmatch(name)
    assert match, f'{name} is not a name of the pattern in docs/recipes.md'
    return match.groupdict()


def load(name):
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def block_of(backbone):
    """The block in a backbone's config, in the words of names."""
    own = re.search('DBB$|^mmpretrain.Reparam', backbone.type)
    if not own:
        conv_cfg = backbone.get('conv_cfg') or {}
        return 'dbbconv' if conv_cfg.get('type') == 'DBB' else 'plain'
    default = 'RepVGGConv' if 'RepVGG' in backbone.type else 'DBB'
    block = backbone.get('block', dict(type=default))['type']
    # RepVGG's branches with a composed kernel.
    return BLOCKS[block.replace('OREPARepVGG', 'OREPA')]


def recipe_of(config):
    """Whose training on ImageNet a config has."""
    rules = config.optim_wrapper.paramwise_cfg
    warms_up = isinstance(config.param_scheduler, list)
    is_orepa = 'norm_decay_mult' in rules
    drops_last = config.train_dataloader.get('drop_last', False)
    assert is_orepa == warms_up == (not drops_last)
    return 'OREPA' if is_orepa else 'DBB'


def check_recipe_and_start(parts, config):
    block, rerun = parts['block'], parts['rerun']
    start = config.model.backbone.init_cfg
    if parts['dataset'].startswith('cifar'):
        assert not rerun and config.train_cfg.max_epochs == 400  # ACNet's
    if parts['dataset'] == 'imagenet':
        assert not (rerun and block == 'orepa')
        theirs = 'OREPA' if rerun or block == 'orepa' else 'DBB'
        assert recipe_of(config) == theirs
    if parts['dataset'] not in ('coco', 'cityscapes'):
        assert not parts['start'] and start.type == 'TorchDefault'
        return
    assert not rerun  # the schedules are mmdet's and mmseg's
    if parts['start'] == 'scratch':
        assert start.type == 'TorchDefault'
    elif parts['start'] == 'from_plain':
        plain = block == 'plain'
        assert start.type == 'Pretrained' if plain else 'PlainPretrained'
        assert '://' in start.checkpoint
    else:
        assert start.type == 'BackbonePretrained'
        # DBB's paper has ResNet-18 there, OREPA's ResNet-50.
        run = f'{parts["backbone"]}_{block}_imagenet'
        if parts['backbone'] == 'resnet50' and block != 'orepa':
            run = run.replace('_imagenet', '_rerun_imagenet')
        assert start.checkpoint == f'work_dirs/{run}/epoch_120.pth'
        assert run in NAMES


@pytest.mark.parametrize('name', NAMES)
def test_name_says_what_is_in_the_config(name):
    parts, config = parts_of(name), load(name)
    backbone = config.model.backbone
    kind, fields = BACKBONES[parts['backbone']]
    stock = rf'(mm\w+\.)?(Plain|Reparam)?{kind}(V1c)?(DBB)?'
    assert re.fullmatch(stock, backbone.type)
    said = {'base_channels', 'stem_channels'} & set(backbone) | set(fields)
    assert {key: backbone[key] for key in said} == fields
    assert block_of(backbone) == parts['block']
    check_recipe_and_start(parts, config)
    dataset = config.train_dataloader.dataset
    dataset = dataset.get('dataset', dataset)  # of a RepeatDataset
    assert dataset.type == DATASETS[parts['dataset']]
    key = parts['dataset'], parts['network']
    if name not in DOWNSTREAM:
        assert parts['network'] is None
        assert config.model.type == 'ImageClassifier'
        return
    heads = ('roi_head', 'bbox_head', 'decode_head')
    head = next(config.model[h] for h in heads if h in config.model)
    assert (config.model.type, head.type) == NETWORKS[key]


@pytest.mark.parametrize('name', DEMOS)
def test_name_says_what_is_in_the_demo(name):
    match = DEMO.fullmatch(name)
    assert match, f'{name} is not a name of the pattern in docs/recipes.md'
    config = load(f'demo/{name}')
    kinds = dict(resnet18_dbb='ResNetDBB', repvgg='ReparamRepVGG')
    assert (
        config.model.backbone.type == f'mmpretrain.{kinds[match["network"]]}'
    )
    folder = config.train_dataloader.dataset.data_root.rstrip('/')
    assert folder == f'data/{match["dataset"]}'
    hooks = {hook['type'] for hook in config.get('custom_hooks', ())}
    block = config.model.backbone.block.type
    added = match['added']
    assert ('KernelPenaltyHook' in hooks) == (added == 'group_lasso')
    assert ('QATHook' in hooks) == (added == 'qat')
    assert (block == 'ConvBN') == (added == 'insert_bn')


def test_docs_list_the_words_of_names():
    text = (ROOT / 'docs' / 'recipes.md').read_text(encoding='utf-8')
    section = text[text.index('## Names of configs') :]
    section = section[: section.index('\n## ')]
    words = set(re.findall(r'`_?(\w+)`', section))
    for parts in map(parts_of, NAMES):
        said = [parts[k] for k in parts if k != 'backbone' and parts[k]]
        assert words >= set(said)


@pytest.mark.parametrize(
    'name', [n for n in DOWNSTREAM if parts_of(n)['block'] != 'plain']
)
def test_a_baseline_of_the_same_recipe_stands_beside(name):
    block = parts_of(name)['block']
    plain = name.replace(f'_{block}_', '_plain_', 1)
    ours, theirs = load(name), load(plain)
    if block != 'dbbconv':  # on mmdet's and mmseg's own ResNets
        with DefaultScope.overwrite_default_scope(ours.default_scope):
            merged = stock_config(ours).model.backbone
        backbone = theirs.model.backbone
        if block == 'orepa' and not parts_of(name)['start']:
            # docs/deviations.md: so that the stem has a rate
            assert merged.get('frozen_stages', -1) == -1
            for each in (merged, backbone):
                each.pop('frozen_stages', None)
        for each in (merged, backbone):
            each.pop('init_cfg')
        assert merged == backbone
    ours, theirs = (config.to_dict() for config in (ours, theirs))
    wrapper = ours['optim_wrapper']
    if wrapper.get('constructor') == 'ReparamOptimWrapperConstructor':
        del wrapper['constructor']
        assert wrapper['paramwise_cfg'].pop('stem_lr_mult') == 1.0
        if not wrapper['paramwise_cfg']:
            del wrapper['paramwise_cfg']
    for config in (ours, theirs):
        del config['custom_imports'], config['model']['backbone']
        if block == 'dbbconv' and 'neck' in config['model']:
            config['model']['neck'].pop('conv_cfg', None)
    assert ours == theirs
