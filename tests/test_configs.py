"""Every config builds, trains a step and merges into the same function.

At a quarter of its width; at full width each is built by
`test_engine/test_model_zoo.py`.
"""

import json
import lzma
import re
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
import torchvision
from helpers import run_tool
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.structures import InstanceData, PixelData
from torch.nn.modules.batchnorm import _BatchNorm

import mmdbb
from mmdbb.blocks.base import ReparamConv2d
from mmdbb.errors import UserError
from mmdbb.mm.official import convert as official
from mmdbb.official import OREPA

ROOT = Path(__file__).resolve().parents[1] / 'configs'
KEYS = Path(__file__).parent / 'data' / 'official' / 'keys.json.xz'
#: But those that other files have: test_backbones/test_unireplknet.py,
#: test_engine/test_repopt.py for RepOptimizer's, which need a file, and
#: test_tools/test_own_data.py, which trains those of own data.
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.rglob('*.py')
    if not {'_base_', 'own_data', 'repopt', 'unireplknet'} & set(path.parts)
)
HEIGHT, WIDTH = 64, 96  # pixels
HEADS = ('decode_head', 'auxiliary_head', 'bbox_head', 'rpn_head')


#: Fields of configs that count channels.
CHANNELS = (
    'base_channels',
    'c1_channels',
    'c1_in_channels',
    'channels',
    'fc_out_channels',
    'feat_channels',
    'hidden_channels',
    'in_channels',
    'mid_channels',
    'num_deconv_filters',
    'out_channels',
    'stem_channels',
)
#: Backbones -> their widths where a config does not say them.
WIDTHS = {
    'AlexNet': dict(channels=(64, 192, 384, 384, 256), hidden_channels=1024),
    'MobileNet': dict(base_channels=32),
    'RepVGG': dict(base_channels=64),
    'ResNe': dict(base_channels=64, stem_channels=64),
}


def narrow(model, by=4):
    """Divide the widths that a model's config says, in place."""
    for name, widths in WIDTHS.items():
        if name in model.backbone.type:
            for key, value in widths.items():
                model.backbone.setdefault(key, value)

    def divide(value):
        if isinstance(value, (list, tuple)):
            return type(value)(divide(one) for one in value)
        return value // by

    def visit(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key in CHANNELS and value is not None:
                    node[key] = divide(value)
                else:
                    visit(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                visit(value)

    visit(model)


def classification_sample(model):
    from mmpretrain.structures import DataSample

    with_classes = model.head if hasattr(model.head, 'fc') else model.backbone
    classes = with_classes.num_classes
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


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Small operators: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What configs would download -> networks with entries of the same names.
PRETRAINED = {
    'torchvision://resnet18': torchvision.models.resnet18,
    'torchvision://resnet50': torchvision.models.resnet50,
    'open-mmlab://resnet18_v1c': lambda: MODELS.build(
        dict(type='mmseg.ResNetV1c', depth=18)
    ),
    'open-mmlab://resnet50_v1c': lambda: MODELS.build(
        dict(type='mmseg.ResNetV1c', depth=50)
    ),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is downloaded."""

    def load(filename, *_, **__):
        return PRETRAINED[filename]().state_dict()

    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', load)


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


def own_run(rule, folder):
    """Write what the run has that a rule names, narrow, and name that.

    Returns:
        dict: The entries of its backbone.
    """
    name = re.fullmatch(
        r'work_dirs/(\w+_imagenet)/epoch_120\.pth', rule.checkpoint
    )
    imagenet = Config.fromfile(ROOT / f'{name[1]}.py')
    assert imagenet.train_cfg.max_epochs == 120
    narrow(imagenet.model)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(imagenet.model)
    generator = torch.Generator().manual_seed(2)
    randomize_norms(model, generator)
    rule.checkpoint = str(folder / 'epoch_120.pth')
    torch.save(dict(state_dict=model.state_dict()), rule.checkpoint)
    return model.backbone.state_dict()


def test_config(config, tmp_path):
    torch.manual_seed(0)
    name = Path(config.filename).name
    if config.model.get('data_preprocessor', {}).get('size'):
        config.model.data_preprocessor.size = (HEIGHT, WIDTH)
    # VGG has no argument for its width, pretrained weights have theirs, and
    # the demo's networks are narrow.
    if not re.search('vgg16|from_plain|/demo/', config.filename):
        narrow(config.model)
    loaded = {}
    start = config.model.backbone.get('init_cfg')
    if isinstance(start, dict) and start['type'] == 'BackbonePretrained':
        with pytest.raises(UserError, match="no.*work_dirs.*use type='Off"):
            MODELS.build(config.model).init_weights()
        loaded = own_run(start, tmp_path)
    model = MODELS.build(config.model)
    model.init_weights()
    state = model.backbone.state_dict()
    for key, value in loaded.items():
        assert torch.equal(state[key], value), key
    assert not loaded or loaded.keys() == state.keys()
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
    first = next(p for p in model.backbone.parameters() if p.requires_grad)
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
    if '_plain_' in name.replace('from_plain', ''):
        assert not blocks  # a baseline
        return
    assert blocks
    merged = mmdbb.reparameterize(model, inplace=True)
    assert not any(isinstance(m, ReparamConv2d) for m in merged.modules())
    for want, have in zip(expected, outputs_of(merged, image)):
        error = (want - have).abs().max() / want.abs().max()
        assert error < 1e-10


@pytest.mark.parametrize('name', ['resnet18_dbb', 'resnet50_acb'])
def test_imagenet_optimizer_is_the_papers(name):
    # train.py of the DBB code: 'bias' in the name doubles the rate.
    config = Config.fromfile(ROOT / f'{name}_imagenet.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
        optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    names = {id(value): key for key, value in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        assert group['momentum'] == 0.9
        assert group['weight_decay'] == 1e-4
        for value in group['params']:
            key = names[id(value)]
            assert group['lr'] == (0.2 if 'bias' in key else 0.1), key
            seen.add(key)
    assert seen == set(names.values())
    assert any('norm' in key and 'bias' in key for key in seen)
    assert config.train_cfg.max_epochs == config.param_scheduler.T_max == 120
    assert config.auto_scale_lr.base_batch_size == 256


def optimizer_values(name):
    """The optimizer of a config: names -> (learning rate, weight decay)."""
    config = Config.fromfile(ROOT / f'{name}.py')
    narrow(config.model)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
        optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    names = {id(value): key for key, value in model.named_parameters()}
    return {
        names[id(value)]: (group['lr'], group['weight_decay'])
        for group in optimizer.param_groups
        for value in group['params']
    }


def test_mobilenet_optimizer_is_the_papers():
    for key, values in optimizer_values('mobilenet_dbb_imagenet').items():
        # train.py of the DBB code
        decay = 0 if 'depth' in key else 1e-4
        assert values == (0.2 if 'bias' in key else 0.1, decay), key


@pytest.mark.parametrize(
    'name', ['mobilenet_dbb', 'alexnet_dbb', 'resnet18_orepa']
)
def test_other_networks_images_are_cropped_and_flipped_only(name):
    config = Config.fromfile(ROOT / f'{name}_imagenet.py')
    pipeline = config.train_dataloader.dataset.pipeline
    assert [transform.type for transform in pipeline] == [
        'LoadImageFromFile',
        'RandomResizedCrop',
        'RandomFlip',
        'PackInputs',
    ]


@pytest.mark.parametrize('name', ['resnet18_orepa', 'resnet50_dbb_rerun'])
def test_orepa_optimizer_is_the_papers(name):
    theirs = {ours.split('.')[-1]: name for name, ours in OREPA.names}
    for key, values in optimizer_values(f'{name}_imagenet').items():
        # train.py of the OREPA code; its norms are called bn
        code = re.sub(r'downsample\.1|norm', 'bn', key)
        *place, last = code.split('.')
        if 'generator' in place:
            code = theirs.get(last, last)
        free = any(word in code for word in ('bias', 'bn', 'prior'))
        lr = 0.2 if 'bias' in code else 0.1
        assert values == (lr, 0 if free else 1e-4), key


@pytest.mark.parametrize(
    'name', [n for n in CONFIGS if n.endswith('cityscapes.py')]
)
def test_segmentors_are_dilated_as_their_base(name):
    if name.startswith('demo'):
        return

    def dilations(config):
        with DefaultScope.overwrite_default_scope('mmseg'):
            backbone = MODELS.build(config.model.backbone)
        stages = backbone.res_layers
        return {
            name: layer.dilation
            for name, layer in backbone.named_modules()
            if name.startswith(tuple(stages)) and hasattr(layer, 'dilation')
        }

    text = (ROOT / name).read_text()
    while 'mmseg::' not in text:
        text = (ROOT / re.search(r"_base_ = '\./(.*)'", text)[1]).read_text()
    base = get_config(re.search(r"'(mmseg::.*)'", text)[1])
    found = dilations(Config.fromfile(ROOT / name))
    expected = dilations(base)
    assert {k: found[k] for k in expected} == expected


@pytest.mark.parametrize(
    'block, decayed',
    [
        ('repvgg', ['identity.norm.weight', 'fc.weight']),
        ('plain', ['branch_reparam.weight', 'fc.weight']),
    ],
)
def test_repvgg_decay_is_the_papers(block, decayed):
    values = optimizer_values(f'repvgg-a1_{block}_rerun_imagenet')
    for key, (_, decay) in values.items():
        assert (decay == 1e-4) == key.endswith(tuple(decayed)), key


def test_orepa_warms_up_for_epochs():
    config = Config.fromfile(ROOT / 'resnet18_orepa_imagenet.py')
    weight = torch.nn.Parameter(torch.zeros(1))
    wrapper = build_optim_wrapper(
        torch.nn.ParameterList([weight]),
        dict(optimizer=config.optim_wrapper.optimizer),
    )
    steps = 20  # iterations an epoch
    schedulers = [
        PARAM_SCHEDULERS.get(cfg.pop('type')).build_iter_from_epoch(
            wrapper,
            **{k: v for k, v in cfg.items() if k != 'convert_to_iter_based'},
            epoch_length=steps,
        )
        for cfg in config.param_scheduler
    ]
    rates = []
    for _ in range(config.train_cfg.max_epochs * steps):
        rates += wrapper.get_lr()['lr']
        for scheduler in schedulers:
            scheduler.step()
    warm, cold = rates[: 5 * steps], rates[5 * steps :]
    assert np.allclose(warm, np.linspace(1e-4, 0.1, 5 * steps))
    expected = 0.05 * (
        1 + np.cos(np.pi * np.arange(115 * steps) / (115 * steps))
    )
    assert np.allclose(cold, expected)


DOWNSTREAM = [
    name
    for name in CONFIGS
    if re.search('(coco|cityscapes).py', name) and not name.startswith('demo')
]


@pytest.mark.parametrize('name', DOWNSTREAM)
def test_papers_configs_fine_tune_and_others_say_scratch(name):
    backbone = Config.fromfile(ROOT / name).model.backbone
    start = backbone.get('init_cfg')
    if '_scratch_' in name:
        assert start == dict(type='TorchDefault')
        assert not backbone.zero_init_residual
        assert backbone.get('frozen_stages', -1) == -1
        assert not backbone.get('norm_eval', False)
        return
    if '_from_plain_' in name:
        baseline = '_plain_from_plain_' in name
        assert start.type == ('' if baseline else 'Plain') + 'Pretrained'
        assert '://' in start.checkpoint
        return
    assert start.type == 'BackbonePretrained'
    if 'dbbconv' not in name:
        # The stem of the papers' weights, not mmseg's.
        assert re.fullmatch(r'mm(pretrain|seg)\.ResNet(DBB)?', backbone.type)


@pytest.mark.parametrize('network', ['resnet18_dbb', 'resnet50_orepa'])
def test_the_papers_networks_start_from_plain_weights_too(network):
    ours = [n for n in DOWNSTREAM if n.startswith(f'{network}_')]
    own = [n for n in ours if 'scratch' not in n and 'from_plain' not in n]
    assert len(own) == dict(resnet18_dbb=2, resnet50_orepa=4)[network]
    for name in own:
        tail = name[len(f'{network}_') :]
        assert f'{network}_from_plain_{tail}' in ours


def test_dbb_fine_tunes_on_the_papers_schedules():
    # 900 iterations an epoch: 126k, 81k and 108k.
    config = Config.fromfile(ROOT / 'resnet18_dbb_centernet_coco.py')
    times = config.train_dataloader.dataset.times
    assert config.train_cfg.max_epochs * times * 900 == 126_000
    steps = config.param_scheduler[1].milestones
    assert [step * times * 900 for step in steps] == [81_000, 108_000]
    assert config.optim_wrapper.optimizer.lr == 0.02
    config = Config.fromfile(ROOT / 'resnet18_dbb_cityscapes.py')
    (schedule,) = config.param_scheduler
    assert (schedule.type, schedule.power) == ('PolyLR', 0.9)
    assert schedule.end == config.train_cfg.max_iters == 80_000
    assert config.optim_wrapper.optimizer.lr == 0.01


@pytest.mark.parametrize('block', ['dbb', 'orepa'])
def test_orepa_fine_tunes_on_the_hosts_schedules(block):
    for name in ('coco', 'retinanet_coco'):
        config = Config.fromfile(ROOT / f'resnet50_{block}_{name}.py')
        assert config.train_cfg.max_epochs == 12
    for name in ('cityscapes', 'deeplabv3plus_cityscapes'):
        config = Config.fromfile(ROOT / f'resnet50_{block}_{name}.py')
        assert config.train_cfg.max_iters == 40_000


def test_scratch_is_long():
    """mmdet's recipe from scratch, and mmseg's only one."""
    config = Config.fromfile(ROOT / 'resnet50_dbb_scratch_coco.py')
    assert config.train_cfg.max_epochs == 73  # six times 12, and one
    assert config.param_scheduler[1].milestones == [65, 71]
    config = Config.fromfile(ROOT / 'resnet18_dbb_scratch_cityscapes.py')
    assert config.train_cfg.max_iters == 320_000
    (schedule,) = config.param_scheduler
    assert schedule.end == 320_000
    assert config.train_dataloader.batch_size == 4


@pytest.mark.parametrize(
    'name', [n for n in DOWNSTREAM if '_plain_scratch_' in n]
)
def test_from_scratch_a_baseline_starts_as_its_blocks(name):
    states = []
    for block in ('plain', 'dbb'):
        config = Config.fromfile(ROOT / name.replace('plain', block))
        narrow(config.model)
        torch.manual_seed(3)
        with DefaultScope.overwrite_default_scope(config.default_scope):
            backbone = MODELS.build(config.model.backbone)
        backbone.init_weights()
        states.append(dict(backbone.named_parameters()))
    plain, blocks = states
    shared = plain.keys() & blocks.keys()
    assert {'conv1.weight', 'bn1.weight'} <= shared < plain.keys()
    for key in shared:
        assert torch.equal(plain[key], blocks[key]), key
    # No residual branch starts as zero.
    assert all(value.any() for n, value in plain.items() if 'weight' in n)


@pytest.mark.parametrize(
    'name', [n for n in DOWNSTREAM if not re.search('scratch|from_plain', n)]
)
def test_a_missing_start_is_said_before_anything_else(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT)
    assert run_tool('train', ROOT / name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    run = Config.fromfile(ROOT / name).model.backbone.init_cfg.checkpoint
    config = f'configs/{Path(run).parent.name}.py'
    assert line.startswith(
        f'train.py: model.backbone.init_cfg starts from {run}, which does not '
        f'exist (training {config} writes it); name yours by --cfg-options '
        'model.backbone.init_cfg.checkpoint=PATH'
    )
    assert (ROOT.parent / config).exists()


#: Files of the papers -> configs that they start, by OfficialPretrained.
OFFICIAL = {
    'dbb_repo_ResNet-18_DBB': r'resnet18_dbb_(centernet_coco|cityscapes)',
    'dbb_repo_ResNet-50_DBB': r'resnet50_dbb_(\w+_)?(coco|cityscapes)',
    'orepa_repo_ResNet-50_OREPA': r'resnet50_orepa_(\w+_)?(coco|cityscapes)',
}


@pytest.mark.parametrize('file', OFFICIAL)
def test_the_papers_files_fit_their_stems(file, monkeypatch):
    keys = json.loads(lzma.open(KEYS).read())[file]
    keys = keys.get('train', keys)
    state = {n: torch.ones(()).expand(shape) for n, shape in keys.items()}
    monkeypatch.setattr(official, 'read_official', lambda path: state)
    names = [
        n
        for n in DOWNSTREAM
        if re.fullmatch(OFFICIAL[file] + r'\.py', n)
        and not re.search('scratch|plain', n)
    ]
    assert len(names) == (2 if '18' in file else 4)
    for name in names:
        config = Config.fromfile(ROOT / name)
        config.merge_from_dict(
            {
                'model.backbone.init_cfg.type': 'OfficialPretrained',
                'model.backbone.init_cfg.checkpoint': 'file.pth',
            }
        )
        with DefaultScope.overwrite_default_scope(config.default_scope):
            backbone = MODELS.build(config.model.backbone)
            backbone.init_weights()
        for parameter in backbone.parameters():
            value = parameter.flatten()[:9]
            assert (value == 1).all()


@pytest.mark.parametrize(
    'name',
    ['coco', 'retinanet_coco', 'cityscapes', 'deeplabv3plus_cityscapes'],
)
def test_stem_of_orepa_has_its_own_rate(name):
    config = Config.fromfile(ROOT / f'resnet50_orepa_{name}.py')
    config.merge_from_dict({'optim_wrapper.paramwise_cfg.stem_lr_mult': 0.25})
    narrow(config.model)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
        optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    base = config.optim_wrapper.optimizer.lr
    stem = {
        id(p)
        for layer in (model.backbone.conv1, model.backbone.norm1)
        for p in layer.parameters()
    }
    seen = 0
    for group in optimizer.param_groups:
        for parameter in group['params']:
            in_stem = id(parameter) in stem
            seen += in_stem
            assert group['lr'] == (0.25 * base if in_stem else base)
    assert seen == len(stem)


def test_cifar_images_and_head_are_the_papers():
    config = Config.fromfile(ROOT / 'vgg16_acb_cifar100.py')
    assert config.data_preprocessor.mean == [127.5] * 3
    assert config.train_dataloader.dataset.type == 'CIFAR100'
    assert config.test_dataloader.dataset.split == 'test'
    assert config.model.head.num_classes == 100
    assert config.data_preprocessor.num_classes == 100
    plain = Config.fromfile(ROOT / 'vgg16_plain_cifar10.py').model
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        with torch.device('meta'):
            model = MODELS.build(plain)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [
        (512, 512),
        (512, 10),
    ]


def test_imagenet_pipeline_runs(tmp_path):
    from mmpretrain.registry import TRANSFORMS

    image = np.random.default_rng(0).integers(256, size=(280, 300, 3))
    path = tmp_path / 'image.jpg'
    mmcv.imwrite(image.astype(np.uint8), str(path))
    config = Config.fromfile(ROOT / 'resnet18_dbb_imagenet.py')
    transforms = [
        TRANSFORMS.build(transform)
        for transform in config.train_dataloader.dataset.pipeline
    ]
    for _ in range(20):  # random transforms, negative hues among them
        results = dict(img_path=str(path), gt_label=3)
        for transform in transforms:
            results = transform(results)
        assert results['inputs'].shape == (3, 224, 224)
        assert results['data_samples'].gt_label.item() == 3


def test_imagenet_lighting_is_the_papers():
    from mmpretrain.registry import TRANSFORMS

    config = Config.fromfile(ROOT / 'resnet18_dbb_imagenet.py')
    pipeline = config.train_dataloader.dataset.pipeline
    types = [transform.type for transform in pipeline]
    start, stop = types.index('PILToNumpy') + 1, types.index('PackInputs')
    image = np.full((2, 3, 3), 254, np.uint8)
    results = dict(img=image)
    np.random.seed(2)
    for transform in pipeline[start:stop]:
        results = TRANSFORMS.build(transform)(results)
    lit = results['img']
    np.random.seed(2)
    alpha = np.random.normal(0, 0.1, 3)
    # utils.py of the DBB code works on RGB in 0..1.
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [
            [-0.5675, 0.7192, 0.4009],
            [-0.5808, -0.0045, -0.8140],
            [-0.5836, -0.6948, 0.4203],
        ]
    )
    shift = 255 * vectors @ (alpha * values)
    assert np.allclose((lit - image)[..., ::-1], shift, atol=1e-4)
    assert lit.max() > 255  # not wrapped around
    assert np.abs(shift[0] - shift[2]) > 0.01  # the order can be seen
