"""RepVGG of any block: the paper's networks, merged exactly, SE kept."""

import pytest
import torch
from helpers import EXACT, deploy, distance, image, randomize
from mmengine.config import Config
from mmpretrain.models import RepVGG
from mmpretrain.models.utils import SELayer
from registered import distinct_blocks
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdbb import load_plain_weights_
from mmdbb.blocks import DBB, RepVGGConv
from mmdbb.mm.backbones import PlainRepVGG, ReparamRepVGG
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.stock.config import stock_config
from mmdbb.reparam import find_blocks, literal_forward, reparameterize
from mmdbb.stock_weights import stock_state

# The table of the RepVGG and OREPA code: depths, widths (times 64, 128, 256,
# 512), groups of every second layer up to the 26th.
ARCHS = {
    'A0': ((2, 4, 14, 1), (0.75, 0.75, 0.75, 2.5), 1),
    'A1': ((2, 4, 14, 1), (1, 1, 1, 2.5), 1),
    'A2': ((2, 4, 14, 1), (1.5, 1.5, 1.5, 2.75), 1),
    'B0': ((4, 6, 16, 1), (1, 1, 1, 2.5), 1),
    'B1': ((4, 6, 16, 1), (2, 2, 2, 4), 1),
    'B1g2': ((4, 6, 16, 1), (2, 2, 2, 4), 2),
    'B1g4': ((4, 6, 16, 1), (2, 2, 2, 4), 4),
    'B2': ((4, 6, 16, 1), (2.5, 2.5, 2.5, 5), 1),
    'B2g2': ((4, 6, 16, 1), (2.5, 2.5, 2.5, 5), 2),
    'B2g4': ((4, 6, 16, 1), (2.5, 2.5, 2.5, 5), 4),
    'B3': ((4, 6, 16, 1), (3, 3, 3, 5), 1),
    'B3g2': ((4, 6, 16, 1), (3, 3, 3, 5), 2),
    'B3g4': ((4, 6, 16, 1), (3, 3, 3, 5), 4),
    'D2se': ((8, 14, 24, 1), (2.5, 2.5, 2.5, 5), 1),
}
#: Two groups in the third layer; the second has an identity branch.
TINY = dict(
    num_blocks=(2, 1, 2, 1),
    width_factor=(0.125, 0.125, 0.0625, 0.0625),
    group_layer_map={3: 2},
    se_cfg=None,
)
SE = dict(TINY, se_cfg=dict(ratio=4, divisor=1))


def small(cls=ReparamRepVGG, arch=TINY, **kwargs):
    return cls(arch, **kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def multiplications(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize('arch', ARCHS)
def test_architectures_are_the_papers(arch):
    depths, widths, groups = ARCHS[arch]
    with torch.device('meta'):
        model = ReparamRepVGG(arch)
    blocks = find_blocks(model)
    assert all(type(block) is RepVGGConv for block in blocks.values())
    stem = min(64, int(64 * widths[0]))
    inside, index = stem, 0
    expected = {'stem.branch_reparam': (3, stem, 1, 2)}
    for i, depth in enumerate(depths):
        width = int(64 * 2**i * widths[i])
        for j in range(depth):
            index += 1
            grouped = index % 2 == 0 and index <= 26
            expected[f'stage_{i + 1}.{j}.branch_reparam'] = (
                inside,
                width,
                groups if grouped else 1,
                1 if j else 2,
            )
            inside = width
    assert expected == {
        name: (b.in_channels, b.out_channels, b.groups, b.stride[0])
        for name, b in blocks.items()
    }
    ratios = {
        m.conv1.in_channels // m.conv1.out_channels
        for m in model.modules()
        if isinstance(m, SELayer)
    }
    assert ratios == ({16} if arch == 'D2se' else set())


@pytest.mark.parametrize(
    ('arch', 'block'),
    [
        *(pytest.param(TINY, name, id=name) for name in distinct_blocks()),
        pytest.param(SE, 'RepVGGConv', id='squeeze and excitation'),
    ],
)
def test_merged_is_equal(arch, block):
    """Here every block is tried in a backbone, of groups and strides."""
    model = small(
        arch=arch, block=dict(type=block), out_indices=range(4)
    ).double()
    randomize(model).eval()
    x = image(2, 3, 40, 56)
    merged = reparameterize(model)
    with torch.no_grad(), literal_forward(model):
        for found, expected in zip(merged(x), model(x)):
            assert distance(found, expected) < EXACT
    model.switch_to_deploy()
    model.switch_to_deploy()
    with torch.no_grad():
        for found, expected in zip(merged(x), model(x)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize('cls', [PlainRepVGG, ReparamRepVGG])
def test_squeeze_and_excitation_counts(cls):
    model = small(cls, SE, deploy=True).double().eval()
    x = image(2, 3, 40, 56)
    with torch.no_grad():
        expected = model(x)[0]
        layers = [m for m in model.modules() if isinstance(m, SELayer)]
        assert len(layers) == 7
        for layer in layers:
            layer.conv2.conv.bias.add_(1)
        assert distance(model(x)[0], expected) > 0.1


@pytest.mark.parametrize(
    'arch, block, stock, merged',
    [
        (TINY, 'RepVGGConv', 'RepVGG', dict(deploy=True)),
        (TINY, 'OREPARepVGG', 'RepVGG', dict(deploy=True)),
        (TINY, 'DBB', 'RepVGG', dict(deploy=True)),
        (SE, 'RepVGGConv', 'PlainRepVGG', dict(deploy=True)),
        (TINY, 'OREPA', 'PlainRepVGG', dict()),  # norms follow its blocks
    ],
)
def test_merges_to_the_stock_network(arch, block, stock, merged, tmp_path):
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            custom_imports=dict(imports=['mmdbb.backbones']),
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='ReparamRepVGG', arch=arch, block=dict(type=block)
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
            ),
        )
    )
    stock_cfg = stock_config(cfg)
    assert stock_cfg.model.backbone == dict(
        type=f'mmpretrain.{stock}', arch=arch, **merged
    )
    assert ('custom_imports' in stock_cfg) == stock.startswith('Plain')
    model = randomize(build_model(cfg).double())
    merged = build_model(stock_cfg).double()
    merged.load_state_dict(stock_state(model, merged))
    x = image(2, 3, 40, 56)
    with torch.no_grad():
        assert distance(merged(x), model(x)) < EXACT
    checkpoint, out = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    torch.save(dict(state_dict=model.float().state_dict()), checkpoint)
    for fuse in (False, True):
        deployed = deploy(
            cfg,
            checkpoint,
            out,
            fuse=fuse,
            image_size=(40, 56),
            overwrite=fuse,
        )
        assert deployed.blocks == 7


@pytest.mark.parametrize('arch', ['A0', 'B1g4', 'D2se'])
def test_merged_costs_what_the_plain_network_does(arch):
    merged = reparameterize(ReparamRepVGG(arch, base_channels=8))
    x = torch.rand(1, 3, 32, 32)
    plain = [PlainRepVGG(arch, base_channels=8, deploy=True)]
    if arch != 'D2se':
        plain.append(RepVGG(arch, base_channels=8, deploy=True))
    for network in plain:
        assert parameters(merged) == parameters(network)
        assert multiplications(merged, x) == multiplications(network, x)
    assert multiplications(
        PlainRepVGG(arch, base_channels=8), x
    ) == multiplications(merged, x)


def test_block_is_chosen_by_one_argument():
    assert all(type(b) is RepVGGConv for b in find_blocks(small()).values())
    model = small(block=dict(type='DBB', branches=['kxk', '1x1']))
    blocks = find_blocks(model)
    assert len(blocks) == 7
    assert all(type(b) is DBB for b in blocks.values())
    assert all(list(b.branches) == ['kxk', '1x1'] for b in blocks.values())
    assert isinstance(model.stage_1[1].norm, nn.Identity)


def test_plain_network_has_norms():
    model = small(PlainRepVGG)
    assert not find_blocks(model)
    assert isinstance(model.stem.norm, nn.BatchNorm2d)
    assert model.stem.branch_reparam.bias is None
    model.switch_to_deploy()
    assert isinstance(model.stem.norm, nn.BatchNorm2d)


def test_host_norm_stays_under_conv_cfg():
    model = small(PlainRepVGG, conv_cfg=dict(type='ACB')).double().eval()
    randomize(model)
    assert len(find_blocks(model)) == 7
    x = image(2, 3, 40, 56)
    with torch.no_grad():
        assert distance(reparameterize(model)(x)[0], model(x)[0]) < EXACT


@pytest.mark.parametrize('cls', [PlainRepVGG, ReparamRepVGG])
@pytest.mark.parametrize('with_cp', [False, True])
def test_train_step_changes_everything(cls, with_cp):
    model = small(cls, SE, with_cp=with_cp)
    model.init_weights()
    assert model.train() is model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    output = model(image(4, 3, 64, 64, dtype=torch.float32))[0]
    (output * torch.randn_like(output)).sum().backward()
    optimizer.step()
    after = model.state_dict()
    same = [k for k, v in after.items() if torch.equal(v, before[k])]
    # Squeezed to so few channels, some hidden units are not active.
    assert not [name for name in same if 'se_layer' not in name]
    if cls is ReparamRepVGG:
        # Blocks see each batch once, recomputed or not.
        counts = [v for k, v in after.items() if k.endswith('tracked')]
        assert counts and all(count == 1 for count in counts)


def test_dilated_stages():
    model = small(
        strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4), out_indices=(1, 3)
    )
    shapes = [y.shape[2:] for y in model(torch.rand(2, 3, 64, 48))]
    assert shapes == [(8, 6), (8, 6)]
    assert model.stage_4[0].branch_reparam.dilation == (4, 4)


def test_conv_cfg_is_refused():
    with pytest.raises(TypeError, match='takes block='):
        small(conv_cfg=dict(type='DBB'))


@pytest.mark.parametrize('by_function', [False, True])
@pytest.mark.parametrize('norms', [False, True])
def test_starts_from_plain_weights_with_and_without_norms(norms, by_function):
    """The merged network has biases, the plain one to train has norms."""
    plain = randomize(small(PlainRepVGG, deploy=not norms)).double()
    model = small().double()
    plain.train(False), model.train(False)
    if by_function:
        loaded = load_plain_weights_(model, plain.state_dict())
        assert loaded[1:] == ([], [], [])
    else:
        model.load_state_dict(plain.state_dict(), strict=True)
    x = image(2, 3, 40, 56)
    with torch.no_grad():
        assert distance(model(x)[-1], plain(x)[-1]) < EXACT
