"""The papers' recipes do what the papers' code does, number by number.

Against what that code computed (`papers.py`), against torchvision's
transforms on photographs, and against schedules written out.
"""

import functools
import re
from pathlib import Path

import numpy as np
import papers
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import set_random_seed
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision import transforms as T

import mmdbb.mm.backbones  # noqa: F401
from mmdbb.blocks.base import ReparamConv2d
from mmdbb.mm.official.recognise import recognise
from mmdbb.reparam import find_blocks

ROOT = Path(__file__).resolve().parents[1] / 'configs'
RECIPES = sorted(
    path.stem
    for pattern in ('*_imagenet.py', '*_cifar10*.py')
    for path in ROOT.glob(pattern)
)
pytestmark = pytest.mark.usefixtures('quiet')


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def load(name):
    return Config.fromfile(ROOT / f'{name}.py')


def started(model, seed=0):
    """Build a model and start it, as a Runner of that seed does."""
    set_random_seed(seed)
    model = MODELS.build(model)
    model.init_weights()
    return model


def is_orepa(config):
    """Whether a config on ImageNet is trained as OREPA's paper does."""
    return isinstance(config.param_scheduler, list)


# The code's own starts and optimizers


RECORDED = {
    'DBB': {
        'resnet18_plain_imagenet': 'ResNet-18 base',
        'resnet18_dbb_imagenet': 'ResNet-18 DBB',
        'resnet50_plain_imagenet': 'ResNet-50 base',
        'resnet50_dbb_imagenet': 'ResNet-50 DBB',
        'mobilenet_plain_imagenet': 'MobileNet base',
        'mobilenet_dbb_imagenet': 'MobileNet DBB',
    },
    'OREPA': {
        'resnet18_plain_rerun_imagenet': 'ResNet-18 base',
        'resnet18_dbb_rerun_imagenet': 'ResNet-18 DBB',
        'resnet18_orepa_imagenet': 'ResNet-18 OREPA',
        'resnet50_plain_rerun_imagenet': 'ResNet-50 base',
        'resnet50_dbb_rerun_imagenet': 'ResNet-50 DBB',
        'resnet50_orepa_imagenet': 'ResNet-50 OREPA',
        'resnext50_plain_rerun_imagenet': 'ResNeXt-50 base',
        'resnext50_dbb_rerun_imagenet': 'ResNeXt-50 DBB',
        'resnext50_orepa_imagenet': 'ResNeXt-50 OREPA',
        'repvgg-a0_plain_rerun_imagenet': 'RepVGG-A0 base',
        'repvgg-a0_orepa_imagenet': 'RepVGG-A0 OREPA_VGG',
        'repvgg-a0_repvgg_rerun_imagenet': 'RepVGG-A0 RepVGG',
    },
    'ACNet': {
        'vgg16_plain_cifar10': 'VGG-16 base',
        'vgg16_acb_cifar10': 'VGG-16 acb',
    },
}
CASES = [
    (code, name, key)
    for code, cases in RECORDED.items()
    for name, key in cases.items()
]
RESULTS = functools.cache(papers.recorded)


def our_names(shapes, backbone):
    """The code's names -> ours in a classifier.

    Args:
        shapes: The code's names -> shapes.
        backbone: Ours.
    """
    if any(name.startswith('stem.conv1.') for name in shapes):
        return vgg_names(shapes)
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    network = recognise(state, 'recorded')
    names = {f'linear.{n}': f'head.fc.{n}' for n in ('weight', 'bias')}
    for name, layer in network.layers.items():
        place = network.network.place(name)
        inside = layer.names(place, network.network, not find_blocks(backbone))
        for rest, ours in inside.items():
            names[f'{name}.{rest}'] = f'backbone.{ours}'
    assert set(names) >= set(shapes)
    return names


def vgg_names(shapes):
    """The same for ACNet's VGG-16, of which there are no files."""
    places = (0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16)
    parts = {
        'conv.': 'conv.',
        'bn.': 'bn.',
        'acb.square_conv.': 'conv.branches.kxk.conv.',
        'acb.square_bn.': 'conv.branches.kxk.norm.',
        'acb.ver_conv.': 'conv.branches.kx1.conv.',
        'acb.ver_bn.': 'conv.branches.kx1.norm.',
        'acb.hor_conv.': 'conv.branches.1xk.conv.',
        'acb.hor_bn.': 'conv.branches.1xk.norm.',
    }
    names = {}
    for name in shapes:
        match = re.fullmatch(r'stem\.conv(\d+)\.(.*\.)(\w+)', name)
        if match:
            place = places[int(match[1]) - 1]
            ours = f'{parts[match[2]]}{match[3]}'
            names[name] = f'backbone.features.{place}.{ours}'
    for n in ('weight', 'bias'):
        names[f'linear1.{n}'] = f'head.layers.0.fc.{n}'
        names[f'linear2.{n}'] = f'head.layers.1.fc.{n}'
    return names


@pytest.mark.parametrize('code, name, key', CASES)
def test_start_and_optimizer_are_the_codes(code, name, key):
    expected = RESULTS()[code]['starts'][key]
    config = load(name)
    model = started(config.model)
    shapes = {n: values[0] for n, values in expected.items()}
    names = our_names(shapes, model.backbone)
    found = dict(model.named_parameters())
    left = set(found) - {names[n] for n in expected}
    if name.startswith('vgg16_plain'):  # docs/deviations.md
        left -= {n for n in left if n.endswith('conv.bias')}
    assert not left
    for theirs, (shape, mean, std, *_) in expected.items():
        value = found[names[theirs]].detach().double()
        if 'vector' in theirs and len(value) < shape[0]:
            continue  # a row that the code neither fills nor reads
        assert list(value.shape) == shape
        count = value.numel()
        if std < 1e-6 * abs(mean) or std == mean == 0:
            assert torch.allclose(value, value.new_tensor(mean)), theirs
            continue
        # Six standard errors of the difference of two draws.
        error = (value.std(unbiased=False) / std - 1).abs()
        assert error < 6 * 0.45 * (2 / count) ** 0.5, theirs
        assert abs(value.mean() - mean) < 6 * std * (2 / count) ** 0.5, theirs

    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    ours = {id(value): n for n, value in found.items()}
    values = {
        ours[id(p)]: [group['lr'], group['weight_decay']]
        for group in optimizer.param_groups
        for p in group['params']
    }
    for theirs, (*_, lr, decay) in expected.items():
        assert values[names[theirs]] == [lr, decay], theirs
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert group['momentum'] == 0.9
        assert not group['nesterov'] and group['dampening'] == 0


@pytest.mark.parametrize('name', RECIPES)
def test_all_layers_outside_blocks_start_as_torchs(name):
    """By torch's formula, for the networks that are not recorded too."""
    config = load(name)
    config.model.backbone.pop('norm_eval', None)
    if not name.startswith('vgg16'):
        narrow(config.model)
    model = started(config.model)
    layers = [
        layer
        for layer in outside_blocks(model)
        if list(layer.parameters(recurse=False))
    ]
    kinds = {type(layer) for layer in layers}
    assert kinds <= {nn.Conv2d, nn.Linear, nn.BatchNorm2d}
    seen = set()
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
            continue
        weight = layer.weight.detach()
        bound = weight[0].numel() ** -0.5
        count = weight.numel()
        assert 1 - 10 / count < weight.abs().max() / bound <= 1.0001
        ratio = weight.std(unbiased=False) / bound * 3**0.5
        assert abs(ratio - 1) < 6 * 0.45 / count**0.5
        if layer.bias is not None:
            assert 0 < layer.bias.abs().max() <= bound
        # No two layers have a share of their numbers.
        first = weight.flatten()[:4].div(bound).tolist()
        assert tuple(first) not in seen
        seen.add(tuple(first))


def outside_blocks(module):
    if isinstance(module, ReparamConv2d):
        return
    yield module
    for child in module.children():
        yield from outside_blocks(child)


def narrow(model):
    from test_configs import narrow

    narrow(model)


# Joint training, in float64


RESNET = dict(stem_channels=4, base_channels=4, stage_blocks=(2, 1, 1, 1))
REPVGG = dict(
    num_blocks=(1, 2, 2, 1),
    width_factor=(1 / 8,) * 4,
    group_layer_map=None,
    se_cfg=None,
    stem_channels=8,
)
BOTTLENECK = dict(RESNET, stage_blocks=(1, 1, 1, 1))
TRAINED = [
    ('DBB', 'ResNet base', 'resnet18_plain_imagenet', RESNET, 32),
    ('DBB', 'ResNet DBB', 'resnet18_dbb_imagenet', RESNET, 32),
    (
        'DBB',
        'MobileNet DBB',
        'mobilenet_dbb_imagenet',
        dict(base_channels=4),
        128,
    ),
    ('OREPA', 'ResNet OREPA', 'resnet18_orepa_imagenet', RESNET, 32),
    ('OREPA', 'bottleneck OREPA', 'resnet50_orepa_imagenet', BOTTLENECK, 128),
    (
        'OREPA',
        'RepVGG OREPA_VGG',
        'repvgg-a0_orepa_imagenet',
        dict(arch=REPVGG),
        64,
    ),
    (
        'OREPA',
        'RepVGG RepVGG',
        'repvgg-a0_repvgg_rerun_imagenet',
        dict(arch=REPVGG),
        64,
    ),
]


@pytest.mark.parametrize('code, key, name, small, channels', TRAINED)
def test_joint_training_is_the_codes(code, key, name, small, channels):
    expected = RESULTS()[code]['steps'][key]
    config = load(name)
    config.model.backbone.update(small)
    if config.model.backbone.type == 'ResNet':  # has no stage_blocks
        config.model.backbone.type = 'PlainResNet'
    config.model.head.update(num_classes=10, in_channels=channels)
    assert config.model.head.loss == dict(
        type='CrossEntropyLoss', loss_weight=1.0
    )
    model = started(config.model).double()
    fill(model, expected['names'])
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    losses = []
    model.train()
    for images, labels in papers.batches(len(expected['losses'])):
        loss = F.cross_entropy(scores_of(model, images), labels)
        losses.append(loss.item())
        wrapper.update_params(loss)
    assert np.allclose(losses, expected['losses'], rtol=1e-9)
    model.eval()
    images, _ = next(papers.batches(1))
    with torch.no_grad():
        found = scores_of(model, images)
    scores = torch.tensor(expected['scores'], dtype=torch.float64)
    assert (found - scores).abs().max() < 1e-8 * scores.abs().max()


@torch.no_grad()
def fill(model, shapes):
    """Give a model what the code's network was given."""
    names = our_names(shapes, model.backbone)
    state = model.state_dict()
    filled = set()
    for theirs, shape in shapes.items():
        name = names[theirs]
        if theirs.endswith(('_prior', 'id_tensor')):  # constants
            continue
        values = papers.values_of(theirs, shape)
        state[name].copy_(values[: len(state[name])] if shape else values)
        filled.add(name)
    assert {n for n, _ in model.named_parameters()} <= filled


def scores_of(model, images):
    features = model.backbone(images)[-1]
    return model.head.fc(features.mean((2, 3)))


# Plain networks beside those with blocks


def bases_of(name):
    """A config's text, and those of its bases here; no config is built."""
    text = (ROOT / name).read_text()
    for base in re.findall(r"'\./(\S+\.py)'", text):
        yield from bases_of(Path(name).parent / base)
    yield name if isinstance(name, str) else name.name


def recipe_of(name):
    """Whose training a config on ImageNet has."""
    return 'imagenet_orepa.py' in bases_of(f'{name}.py')


def fellows():
    """Baselines and the configs that are compared with them."""
    for plain in RECIPES:
        network, block, *rest = plain.split('_')
        if block != 'plain':
            continue
        for other in RECIPES:
            theirs, block, *end = other.split('_')
            if theirs != network or block == 'plain' or end[-1] != rest[-1]:
                continue
            if recipe_of(plain) == recipe_of(other):
                yield plain, other


FELLOWS = list(fellows())


def test_every_baseline_has_a_fellow_and_every_block_a_baseline():
    plain, others = map(set, zip(*FELLOWS))
    for name in ('resnet18_orepa_imagenet', 'alexnet_dbb_imagenet'):
        assert recipe_of(name) == is_orepa(load(name)) == ('orepa' in name)
    assert plain == {n for n in RECIPES if '_plain_' in n}
    assert plain | others == set(RECIPES)


@pytest.mark.parametrize('plain, other', FELLOWS)
def test_baseline_differs_in_the_blocks_only(plain, other):
    configs = [load(name) for name in (plain, other)]
    models = []
    for config in configs:
        if not plain.startswith('vgg16'):
            narrow(config.model)
        models.append(started(config.model, seed=5))
    base, found = (dict(model.named_parameters()) for model in models)
    shared = base.keys() & found.keys()
    for name in shared:
        assert torch.equal(base[name], found[name]), name
    # What is not shared is a block, or what it stands for.
    blocks = find_blocks(models[1])
    inside = tuple(f'{name}.' for name in blocks)
    norms = tuple(re.sub(r'conv(\d?)\.$', r'bn\1.', n) for n in inside)
    norms += tuple(n.replace('branch_reparam', 'norm') for n in inside)
    assert all(n.startswith(inside) for n in found.keys() - shared)
    assert all(n.startswith(inside + norms) for n in base.keys() - shared)
    assert any(n.startswith('head') for n in shared) or 'alexnet' in plain

    fields = [config.to_dict() for config in configs]
    for each in fields:
        for name in ('custom_imports', 'model'):
            del each[name]
        rules = each['optim_wrapper']['paramwise_cfg']
        for name in ('custom_l2', 'identity_decay_mult'):  # of the blocks
            rules.pop(name, None)
    assert fields[0] == fields[1]


# Schedules and what else makes a step


def rates_of(config, steps):
    """Learning rates of two groups at each iteration.

    Args:
        config: The recipe.
        steps: Iterations an epoch.
    """
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    wrapper = build_optim_wrapper(
        nn.ParameterList(weights),
        dict(optimizer=config.optim_wrapper.optimizer),
    )
    lr = config.optim_wrapper.optimizer.lr
    wrapper.optimizer.param_groups[0]['lr'] = lr
    wrapper.optimizer.param_groups[0]['params'] = weights[:1]
    wrapper.optimizer.add_param_group(dict(params=weights[1:], lr=2 * lr))
    schedulers = config.param_scheduler
    schedulers = [
        PARAM_SCHEDULERS.get(cfg['type']).build_iter_from_epoch(
            wrapper,
            **{
                k: v
                for k, v in cfg.items()
                if k not in ('type', 'convert_to_iter_based')
            },
            epoch_length=steps,
        )
        for cfg in (
            schedulers if isinstance(schedulers, list) else [schedulers]
        )
    ]
    for _ in range(config.train_cfg.max_epochs * steps):
        yield [group['lr'] for group in wrapper.optimizer.param_groups]
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize(
    'name, epochs',
    [
        ('resnet18_dbb_imagenet', 120),
        ('mobilenet_plain_imagenet', 120),
        ('vgg16_acb_cifar10', 400),
    ],
)
def test_cosine_is_the_codes(name, epochs):
    steps = 7
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [dict(params=[w], lr=lr) for w, lr in zip(weights, (0.1, 0.2))]
    optimizer = torch.optim.SGD(groups, 0.1)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * steps)
    found = list(rates_of(load(name), steps))
    assert len(found) == epochs * steps
    for rates in found:
        expected = [group['lr'] for group in optimizer.param_groups]
        assert np.allclose(rates, expected, rtol=1e-10, atol=1e-15)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize('name', RECIPES)
def test_nothing_is_added_to_the_papers_step(name):
    """float32, no smoothing of labels, averages of weights or mixing."""
    config = load(name)
    assert config.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper'
    assert set(config.optim_wrapper) <= {
        'constructor',
        'optimizer',
        'paramwise_cfg',
        'type',
    }
    assert config.model.head.loss == dict(
        type='CrossEntropyLoss', loss_weight=1.0
    )
    assert not config.get('custom_hooks') and not config.model.get('train_cfg')
    assert config.optim_wrapper.optimizer == dict(
        type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4
    )


@pytest.mark.parametrize(
    'name', [n for n in RECIPES if n.endswith('_imagenet')]
)
def test_batches_and_processes_are_the_codes(name):
    config = load(name)
    loader = config.train_dataloader
    assert 8 * loader.batch_size == config.auto_scale_lr.base_batch_size == 256
    assert config.env_cfg.cudnn_benchmark
    wrapper = config.get('model_wrapper_cfg', {})
    if is_orepa(config):
        assert not loader.get('drop_last', False)
        assert wrapper.broadcast_buffers  # torch's default
        assert wrapper.type == 'MMDistributedDataParallel'
    else:
        assert loader.drop_last  # 5004 steps an epoch
        assert not wrapper  # mmengine broadcasts none


def test_cifar_batch_is_the_papers():
    # do_acnet.py: 128 on one GPU; the loader drops nothing.
    config = load('vgg16_acb_cifar10')
    loader = config.train_dataloader
    assert loader.batch_size == config.auto_scale_lr.base_batch_size == 128
    assert not loader.get('drop_last', False)
    assert config.train_cfg.max_epochs == 400
    assert config.train_cfg.val_interval == 5


# Pixels


def photographs(folder):
    """JPEGs: two photographs, their parts, one turned, one in print's ink."""
    sklearn = pytest.importorskip('sklearn.datasets')
    from PIL import Image

    for name in ('china.jpg', 'flower.jpg'):
        whole = Image.fromarray(sklearn.load_sample_image(name))
        for i, box in enumerate(
            [(0, 0, 640, 427), (30, 10, 301, 420), (5, 7, 605, 258)]
        ):
            path = folder / f'{i}_{name}'
            whole.crop(box).save(path, quality=90)
            yield path
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    whole.save(folder / 'turned.jpg', exif=exif)
    whole.convert('CMYK').save(folder / 'ink.jpg')
    yield from (folder / 'turned.jpg', folder / 'ink.jpg')


NORMALIZE = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def opened(path):
    """An image as torchvision's ImageFolder opens it."""
    from torchvision.datasets.folder import pil_loader

    return pil_loader(str(path))


def preprocessed(config, pipeline, crop=None, **results):
    """What a network sees: the pipeline, then the model's preprocessor.

    Args:
        config: The recipe.
        pipeline: One of its pipelines.
        crop: In place of a random one: y, x, height, width.
        results: What the pipeline starts from.
    """
    from mmpretrain.registry import TRANSFORMS

    for fields in pipeline:
        transform = TRANSFORMS.build(fields)
        if crop and fields['type'] == 'RandomResizedCrop':
            transform.rand_crop_params = lambda _: crop
        results = transform(results)
    model = dict(config.model.get('data_preprocessor') or {})
    fields = dict(type='ClsDataPreprocessor') | config.data_preprocessor
    preprocessor = MODELS.build(fields | model)
    data = dict(inputs=[results['inputs']], data_samples=None)
    return preprocessor(data)['inputs'][0], results


@pytest.mark.parametrize('part', ['val', 'test'])
@pytest.mark.parametrize(
    'name', [n for n in RECIPES if n.endswith('_imagenet')]
)
def test_validation_pixels_are_the_papers(name, part, tmp_path):
    # utils.py: val_preprocess
    reference = T.Compose(
        [T.Resize(256), T.CenterCrop(224), T.ToTensor(), NORMALIZE]
    )
    config = load(name)
    pipeline = config[f'{part}_dataloader'].dataset.pipeline
    paths = list(photographs(tmp_path))
    # One base for all: all photographs for two of them.
    some = paths if name in SEEN else paths[-3:-1]
    for path in some:
        found, _ = preprocessed(config, pipeline, img_path=str(path))
        expected = reference(opened(path))
        assert torch.allclose(found, expected, atol=2e-6), path.name


SEEN = ('resnet18_dbb_imagenet', 'resnet18_orepa_imagenet')


@pytest.mark.parametrize(
    'name', ['resnet18_dbb', 'mobilenet_dbb', 'resnet18_orepa', 'alexnet_acb']
)
def test_training_pixels_are_the_papers(name, tmp_path):
    config = load(f'{name}_imagenet')
    pipeline = config.train_dataloader.dataset.pipeline
    strong = name == 'resnet18_dbb'  # utils.py: strong_train_preprocess
    boxes = [(40, 33, 180, 211), (3, 100, 120, 90), (0, 0, 400, 260)]
    flips = set()
    for seed, (path, box) in enumerate(
        (p, b) for p in photographs(tmp_path) for b in boxes
    ):
        image = opened(path)
        top, left, height, width = box
        crop = (
            top,
            left,
            min(height, image.height - top),
            min(width, image.width - left),
        )
        set_random_seed(seed)
        found, results = preprocessed(
            config, pipeline, crop, img_path=str(path), gt_label=0
        )
        flips.add(bool(results['data_samples'].get('flip')))
        expected = T.functional.resized_crop(image, *crop, [224, 224])
        if results['data_samples'].get('flip'):
            expected = T.functional.hflip(expected)
        if strong:
            torch.manual_seed(seed)
            expected = T.ColorJitter(0.4, 0, 0.4, 0.4)(expected)
            shift = lighting_of(seed)
            expected = T.ToTensor()(expected) + shift[:, None, None]
        else:
            expected = T.ToTensor()(expected)
        assert torch.allclose(found, NORMALIZE(expected), atol=2e-5)
    assert flips == {False, True}


def lighting_of(seed):
    """utils.py: PCALighting, for numpy's numbers after those of the flip."""
    np.random.seed(seed)
    np.random.rand()
    alpha = np.random.normal(0, 0.1, 3)
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [
            [-0.5675, 0.7192, 0.4009],
            [-0.5808, -0.0045, -0.8140],
            [-0.5836, -0.6948, 0.4203],
        ]
    )
    return torch.from_numpy(vectors @ (alpha * values)).float()


def test_training_crops_are_as_large_as_torchvisions():
    from mmpretrain.datasets.transforms import RandomResizedCrop

    config = load('resnet18_orepa_imagenet')
    fields = dict(config.train_dataloader.dataset.pipeline[1])
    assert fields.pop('type') == 'RandomResizedCrop'
    ours = RandomResizedCrop(**fields)
    theirs = T.RandomResizedCrop(224)
    image = torch.zeros(3, 375, 500)
    set_random_seed(0)
    boxes = [
        np.array(
            [(a[0], a[1], a[2], a[3]) for a in (draw() for _ in range(4000))],
            dtype=float,
        )
        for draw in (
            lambda: ours.rand_crop_params(np.zeros((375, 500, 3))),
            lambda: theirs.get_params(image, theirs.scale, theirs.ratio),
        )
    ]
    for found, expected in zip(*(b.T for b in boxes)):
        error = 4 * expected.std() * (2 / len(found)) ** 0.5
        assert abs(found.mean() - expected.mean()) < error
        assert abs(found.std() / expected.std() - 1) < 0.06


@pytest.mark.parametrize('name', ['vgg16_acb_cifar10', 'vgg16_dbb_cifar100'])
def test_cifar_pixels_are_the_papers(name):
    # data_factory.py
    config = load(name)
    random = np.random.default_rng(0)
    normalize = T.Normalize([0.5] * 3, [0.5] * 3)
    places = set()
    for seed in range(12):
        array = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
        for part in ('val', 'train'):
            set_random_seed(seed)
            found, results = preprocessed(
                config,
                config[f'{part}_dataloader'].dataset.pipeline,
                img=array.copy(),
                gt_label=1,
            )
            image = T.ToTensor()(array)
            if part == 'val':
                assert torch.allclose(found, normalize(image), atol=1e-6)
                continue
            padded = F.pad(image, (4,) * 4)  # black, as T.Pad
            flip = bool(results['data_samples'].get('flip'))
            crops = {
                (y, x): normalize(padded[:, y : y + 32, x : x + 32])
                for y in range(9)
                for x in range(9)
            }
            if flip:
                crops = {place: c.flip(-1) for place, c in crops.items()}
            fits = [
                place
                for place, crop in crops.items()
                if torch.allclose(crop, found, atol=1e-6)
            ]
            assert len(fits) == 1
            places.add((*fits[0], flip))
    assert len(places) > 8 and {flip for *_, flip in places} == {False, True}
