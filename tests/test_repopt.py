"""RepOptimizer against the paper's code, and against scaled branches."""

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, distance
from torch import nn

from mmdbb import DBB, reparameterize
from mmdbb.blocks import LinearAddConv
from mmdbb.blocks.linear import linear_branches
from mmdbb.errors import UserError
from mmdbb.files.formats import write_checkpoint
from mmdbb.geometry import ConvSpec
from mmdbb.repopt import (
    ConvScales,
    branch_scales,
    load_scales,
    save_scales,
    scale_gradients_,
    start_as_branches_,
)

DATA = Path(__file__).parent / 'data/repopt.npz'
SGD = dict(lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)


# Against the paper's code; tests/data/record_repopt.py has the recipe.


@pytest.fixture(scope='module')
def papers():
    with np.load(DATA) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def under(papers, kind):
    return {
        name.partition('/')[2]: value
        for name, value in papers.items()
        if name.startswith(f'{kind}/')
    }


class Unit(nn.Module):
    def __init__(self, weight, stride):
        super().__init__()
        out, inside = weight.shape[:2]
        self.conv = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class PapersNet(nn.Module):
    """The paper's RepOptVGG of the strides that were recorded."""

    def __init__(self, state):
        super().__init__()
        strides = dict.fromkeys(('stage0', 'stage2.0'), 2)
        names = [n.removesuffix('.conv.weight') for n in state if 'conv' in n]
        units = {
            name: Unit(state[f'{name}.conv.weight'], strides.get(name, 1))
            for name in names
        }
        self.stage0 = units.pop('stage0')
        for stage in ('stage1', 'stage2', 'stage3', 'stage4'):
            own = [unit for name, unit in units.items() if stage in name]
            self.add_module(stage, nn.Sequential(*own))
        self.linear = nn.Linear(*reversed(state['linear.weight'].shape))
        self.double().load_state_dict(state)

    def forward(self, x):
        for stage in list(self.children())[:-1]:
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def papers_scales(papers):
    scales = {}
    keys = dict(conv='kxk', identity='identity')
    for name, value in under(papers, 'search').items():
        unit, _, rest = name.rpartition('.scale_')
        key = rest.removesuffix('.weight')
        scales.setdefault(f'{unit}.conv', {})[keys.get(key, key)] = value
    assert any('identity' in own for own in scales.values())
    return {name: ConvScales([*own], own) for name, own in scales.items()}


def groups(model):
    """The paper's: no decay for what has one dimension."""
    several = [p for p in model.parameters() if p.dim() > 1]
    single = [p for p in model.parameters() if p.dim() == 1]
    return [dict(params=several), dict(params=single, weight_decay=0.0)]


def assert_state(found, expected):
    for name, value in expected.items():
        if value.is_floating_point():
            assert distance(found[name], value) < EXACT, name


def test_start_is_the_papers(papers, monkeypatch):
    model = PapersNet(under(papers, 'before'))

    @torch.no_grad()
    def drawn(tensor, a=0.0):
        numbers = torch.linspace(-1, 2, tensor.numel()).double().sin()
        return tensor.copy_(numbers.reshape(tensor.shape))

    real = nn.init.kaiming_uniform_
    monkeypatch.setattr(nn.init, 'kaiming_uniform_', drawn)
    names = start_as_branches_(model, papers_scales(papers))
    monkeypatch.setattr(nn.init, 'kaiming_uniform_', real)
    assert len(names) == 6
    found = model.state_dict()
    for name, value in under(papers, 'start').items():
        # The 1x1 kernels are drawn in single precision, as conv's are.
        assert distance(found[name], value) < 1e-7, name


def test_training_is_the_papers(papers):
    model = PapersNet(under(papers, 'start')).train()
    optimizer = torch.optim.SGD(groups(model), **SGD)
    scale_gradients_(optimizer, model, papers_scales(papers))
    losses = []
    for x, y in zip(papers['x'], papers['y']):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert distance(torch.stack(losses), papers['losses']) < EXACT
    assert_state(model.state_dict(), under(papers, 'end'))


# Against the network of scaled branches (the paper's check_equivalency)


def scaled_net(groups=1, **kwargs):
    """A network of scaled branches, whose scales are constant."""
    kwargs = dict(train_scales=False, **kwargs)
    net = nn.Sequential(
        LinearAddConv(3, 4, (3, 2), 2, 1, bias=False, **kwargs),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        LinearAddConv(4, 4, 3, padding=1, groups=groups, **kwargs),
    ).double()
    with torch.no_grad():
        for layer in (net[0], net[3]):
            for scale in layer.generator.scales.values():
                scale.uniform_(-1.5, 1.5)
    return net


def train(net, optimizer, steps=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(2, 3, 9, 8, generator=generator).double()
        optimizer.zero_grad()
        net(x).var().backward()
        optimizer.step()


@pytest.mark.parametrize(
    'options',
    [
        dict(lr=0.1),
        dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        dict(lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1),
        dict(lr=0.1, momentum=0.9, foreach=True),
    ],
)
@pytest.mark.parametrize(
    'block',
    [
        dict(),
        dict(block=dict(type='DBB')),
        dict(block=dict(type='DBB'), groups=4),
        dict(block=dict(type='ACB'), groups=2),
        dict(branches=['kxk', '1x1', 'kxk', '1x1_avg']),
    ],
)
def test_plain_training_is_that_of_scaled_branches(block, options):
    net = scaled_net(**block)
    plain, scales = reparameterize(net), branch_scales(net)
    unscaled = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(plain.parameters(), **options)
    scale_gradients_(optimizer, plain, scales)
    for layer in (net[0], net[3]):
        # Each branch by itself, where the block runs one convolution.
        layer.forward = layer.forward_branches
    train(net, torch.optim.SGD(net.parameters(), **options))
    train(plain, optimizer)
    train(unscaled, torch.optim.SGD(unscaled.parameters(), **options))
    for i in (0, 3):
        kernel = net[i].get_equivalent_kernel_bias().kernel
        assert distance(plain[i].weight, kernel) < EXACT
        assert distance(unscaled[i].weight, kernel) > 1e-3
    assert distance(plain[1].weight, net[1].weight) < EXACT


# The optimizer, in the ways people use one


def pair(**options):
    """A plain network with scales, and its optimizer."""
    torch.manual_seed(0)
    net = scaled_net()
    plain, scales = reparameterize(net), branch_scales(net)
    optimizer = torch.optim.SGD(
        plain.parameters(), **{**dict(lr=0.1, momentum=0.9), **options}
    )
    scale_gradients_(optimizer, plain, scales)
    return plain, optimizer, scales


def test_gradients_stay_as_they_were():
    plain, optimizer, _ = pair()
    plain(torch.randn(2, 3, 9, 8).double()).var().backward()
    before = [p.grad.clone() for p in plain.parameters()]
    optimizer.step()
    for found, expected in zip(plain.parameters(), before):
        assert torch.equal(found.grad, expected)


def test_a_closure_is_as_a_step_after_backward():
    (first, one, _), (second, two, _) = pair(), pair()
    x = torch.randn(2, 3, 9, 8).double()

    def closure():
        two.zero_grad()
        loss = second(x).var()
        loss.backward()
        return loss

    for step in (lambda: two.step(closure), lambda: two.step(closure=closure)):
        one.zero_grad()
        expected = first(x).var()
        expected.backward()
        one.step()
        assert distance(step(), expected) < EXACT
    assert_state(second.state_dict(), first.state_dict())


def test_resumed_training_goes_on():
    plain, optimizer, scales = pair()
    train(plain, optimizer, 2)
    file = io.BytesIO()
    torch.save((plain.state_dict(), optimizer.state_dict()), file)
    train(plain, optimizer, 2)
    file.seek(0)
    weights, state = torch.load(file)
    again, second, _ = pair()
    again.load_state_dict(weights)
    second.load_state_dict(state)
    train(again, second, 2)
    assert_state(again.state_dict(), plain.state_dict())
    # Not with other scales, nor with a state that was trained without any.
    _, other, _ = pair()
    state['param_groups'][0]['branch_scales'] = 'others'
    other.load_state_dict(state)
    with pytest.raises(ValueError, match='with other scales of branches'):
        train(again, other, 1)
    del state['param_groups'][0]['branch_scales']
    other.load_state_dict(state)
    with pytest.raises(ValueError, match='or with none: resume'):
        train(again, other, 1)


def test_several_groups_and_frozen_layers():
    net = scaled_net()
    plain, scales = reparameterize(net), branch_scales(net)
    plain[0].requires_grad_(False)
    before = plain[0].weight.clone()
    optimizer = torch.optim.SGD(
        [
            dict(params=plain[1].parameters(), weight_decay=0.0),
            dict(params=plain[3].parameters(), lr=0.01),
        ],
        lr=0.1,
        weight_decay=0.1,
    )
    scale_gradients_(optimizer, plain, scales)
    net[0].requires_grad_(False)
    train(plain, optimizer)
    twin = torch.optim.SGD(
        [
            dict(params=net[1].parameters(), weight_decay=0.0),
            dict(params=net[3].parameters(), lr=0.01),
        ],
        lr=0.1,
        weight_decay=0.1,
    )
    train(net, twin)
    kernel = net[3].get_equivalent_kernel_bias().kernel
    assert distance(plain[3].weight, kernel) < EXACT
    assert torch.equal(plain[0].weight, before)
    plain.requires_grad_(False)
    plain[1].requires_grad_(True)
    frozen = torch.optim.SGD(plain[1].parameters(), 0.1)
    with pytest.raises(ValueError, match='0, 3 are frozen'):
        scale_gradients_(frozen, plain, scales)


def test_a_group_that_is_added_later():
    plain, _, scales = pair()
    optimizer = torch.optim.SGD(plain[3].parameters(), lr=0.1)
    scale_gradients_(optimizer, plain[3], {'': scales['3']})
    optimizer.add_param_group(dict(params=plain[1].parameters()))
    train(plain, optimizer, 1)


def test_autocast_and_a_scaled_loss():
    """A loss that is scaled, and unscaled before the step, as AMP does."""
    torch.manual_seed(0)
    net = scaled_net().float()
    plain, scales = reparameterize(net), branch_scales(net)
    plain.to(memory_format=torch.channels_last)
    results = []
    for scaler in (None, torch.amp.GradScaler('cpu', init_scale=1024.0)):
        model = copy.deepcopy(plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scale_gradients_(optimizer, model, scales)
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(torch.ones(2, 3, 9, 8)).float().square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        results.append(model.state_dict())
    moved = distance(results[0]['3.weight'], plain[3].weight)
    assert moved > 1e-4
    for name, value in results[0].items():
        assert distance(results[1][name], value) < 1e-6, name


def test_a_convolution_in_two_places():
    conv = LinearAddConv(3, 3, 3, padding=1, train_scales=False).double()
    net = nn.Sequential(conv, nn.Tanh(), conv)
    plain, scales = reparameterize(net), branch_scales(net)
    assert list(scales) == ['0'] and plain[0] is plain[2]
    scales['2'] = scales['0']  # its other name, with the same scales
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    scale_gradients_(optimizer, plain, scales)
    train(plain, optimizer, 3)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), 3)
    kernel = conv.get_equivalent_kernel_bias().kernel
    assert distance(plain[0].weight, kernel) < EXACT
    other = {k: v + 1 for k, v in scales['0'].scales.items()}
    scales['2'] = ConvScales(scales['0'].branches, other)
    with pytest.raises(ValueError, match='2 shares its weight'):
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        scale_gradients_(optimizer, plain, scales)


# Files, and what does not fit


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_scales_in_a_file(tmp_path, suffix):
    net = scaled_net(branches=['kxk', dict(type='1x1', norm=False), 'kxk'])
    scales, path = branch_scales(net), tmp_path / f'a.{suffix}'
    save_scales(scales, path)
    found = load_scales(str(path))
    assert list(found) == ['0', '3']
    for name, own in scales.items():
        assert found[name].branches == own.branches
        assert found[name].scales.keys() == own.scales.keys()
        for key, value in own.scales.items():
            assert torch.equal(found[name].scales[key], value)
    model = reparameterize(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scale_gradients_(optimizer, model, found)
    with pytest.raises(UserError, match='output exists'):
        save_scales(scales, path)
    save_scales(scales, path, overwrite=True)


def test_files_that_are_none_of_scales(tmp_path):
    path = tmp_path / 'a.pth'
    with pytest.raises(UserError, match=r'must end in .pth or .safetensors'):
        save_scales(branch_scales(scaled_net()), tmp_path / 'a.txt')
    torch.save(scaled_net().state_dict(), path)
    with pytest.raises(UserError, match='is no file of scales: tools/repopt'):
        load_scales(path)
    note = dict(branch_scales=dict(a=['kxk', '1x1']))
    write_checkpoint(str(path), {'a/kxk': torch.ones(4)}, note)
    with pytest.raises(UserError, match=r'is damaged: a has the branches'):
        load_scales(path)
    strange = dict(type='kxk', norm_cfg=dict(type=nn.BatchNorm2d))
    scales = dict(a=ConvScales([strange], dict(kxk=torch.ones(4))))
    with pytest.raises(UserError, match='no file of scales'):
        save_scales(scales, tmp_path / 'b.pth')
    assert not (tmp_path / 'b.pth').exists()


def test_networks_without_scales():
    with pytest.raises(ValueError, match='no LinearAdd block'):
        branch_scales(nn.Sequential(DBB(2, 2, 3)))
    with pytest.raises(ValueError, match='no LinearAdd block'):
        branch_scales(reparameterize(scaled_net()))


def of(value, branches=('kxk', '1x1')):
    return {'0': ConvScales(list(branches), dict.fromkeys(branches, value))}


@pytest.mark.parametrize(
    ('layer', 'scales', 'message'),
    [
        (nn.Conv2d(2, 3, 3), {}, 'there are no scales'),
        (nn.Conv2d(2, 3, 3), of([1, 2, 3]), 'kxk must be a tensor'),
        (nn.Conv2d(2, 3, 3), of(torch.ones(3), []), 'must be a list'),
        (nn.Conv2d(2, 3, 3), {'9': of(1)['0']}, "has no '?9.*are '?0"),
        (nn.Conv2d(2, 3, 3), of(torch.ones(4)), r'0: kxk has \(4,\) scales'),
        (nn.Conv2d(2, 3, 3), of(torch.ones(3) * np.nan), 'finite number'),
        (nn.Conv2d(2, 3, 1), of(torch.ones(3)), "branch '1x1' needs a kernel"),
        (nn.Conv2d(2, 3, 3), of(torch.ones(3), ['x']), "unknown branch 'x'"),
        (nn.Conv2d(2, 3, 3), of(torch.ones(3), ['1x1_kxk']), 'is not linear'),
        (nn.Linear(2, 3), of(torch.ones(3)), 'is a Linear, not an nn.Conv2d'),
        (DBB(2, 3, 3), of(torch.ones(3)), 'a DBB, which has branches'),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
            of(torch.ones(3)),
            'weight is computed',
        ),
        (
            nn.Conv2d(2, 3, 3),
            {'0': ConvScales(['kxk', '1x1'], dict(kxk=torch.ones(3)))},
            r'but scales of \[',
        ),
    ],
)
def test_scales_that_do_not_fit(layer, scales, message):
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        scale_gradients_(optimizer, model, scales)
    with pytest.raises(ValueError, match=message):
        start_as_branches_(model, scales)


def test_scales_of_other_types(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    for wrong in ('scales.pth', None, {'0': dict(kxk=torch.ones(3))}):
        with pytest.raises(TypeError, match='a dict of names and ConvScales'):
            start_as_branches_(model, wrong)
        with pytest.raises(TypeError, match='a dict of names and ConvScales'):
            save_scales(wrong, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='there are no scales'):
        save_scales({}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='0 is on the meta device'):
        start_as_branches_(model.to('meta'), of(torch.ones(3)))


def test_optimizers_that_do_not_fit():
    plain, optimizer, scales = pair()
    with pytest.raises(TypeError, match='for SGD only.*got a AdamW'):
        adam = torch.optim.AdamW(plain.parameters())
        scale_gradients_(adam, plain, scales)
    with pytest.raises(ValueError, match='has scales already'):
        scale_gradients_(optimizer, plain, scales)
    stranger = torch.optim.SGD(plain[1].parameters(), lr=0.1)
    with pytest.raises(ValueError, match='does not train 0, 3'):
        scale_gradients_(stranger, plain, scales)


# Which branches are linear, and how

KXK = ['kxk', 'kxk_2', 'kxk_3', 'kxk_4']


def linear_of(spec, **kwargs):
    found = linear_branches(
        ConvSpec(**{**dict(kernel_size=3), **spec}), **kwargs
    )
    return {b.key: b for b in found.branches}, found.left_out


@pytest.mark.parametrize(
    ('name', 'expected', 'left_out'),
    [
        ('RepVGGConv', ['identity', 'kxk', '1x1'], []),
        ('ACB', ['kxk', 'kx1', '1xk'], []),
        ('DBB', ['kxk', '1x1', '1x1_avg'], ['1x1_kxk']),
        ('QARepVGGConv', ['kxk', '1x1', 'identity'], []),
        ('OREPARepVGG', ['identity', '1x1'], ['orepa']),
        ('MobileOneConv', ['identity', '1x1', *KXK], []),
        ('LargeKernelConv', ['kxk', 'kxk_k5'], []),
        (
            'DilatedReparamConv',
            ['kxk', 'kxk_k5', 'kxk_k3_d2', 'kxk_k3_d3'],
            [],
        ),
    ],
)
def test_the_linear_branches_of_presets(name, expected, left_out):
    size = 7 if name in ('LargeKernelConv', 'DilatedReparamConv') else 3
    spec = dict(in_channels=4, out_channels=4, kernel_size=size)
    branches, found = linear_of(spec, block=dict(type=name))
    assert (list(branches), found) == (expected, left_out)
    block = LinearAddConv(4, 4, size, block=dict(type=name))
    assert block.left_out == left_out
    assert [*block.generator.scales] == expected


@pytest.mark.parametrize(
    ('block', 'size', 'expected'),
    [
        (dict(type='LargeKernelConv', small_kernel=3), 9, ['kxk', 'kxk_k3']),
        (dict(type='LargeKernelConv', small_kernel=None), 9, ['kxk']),
        (dict(type='LargeKernelConv'), 8, ['kxk']),  # none fits its middle
        (dict(type='MobileOneConv', num_conv_branches=1), 1, ['kxk']),
        (dict(type='ACB', shift=False, max_kernel_size=9), 3, ['kxk', 'kx1']),
    ],
)
def test_the_block_s_arguments_say_which_branches_it_has(
    block, size, expected
):
    spec = dict(in_channels=4, out_channels=6, kernel_size=size)
    branches, _ = linear_of(spec, block=block)
    assert list(branches)[:2] == expected
    with pytest.raises(TypeError, match=r"unknown keys \['small'\]"):
        linear_of(spec, block=dict(block, small=3))


def test_maps_by_hand():
    spec = dict(in_channels=2, out_channels=2, kernel_size=(2, 3))
    names = ['kxk', '1x1', 'kx1', '1xk', '1x1_avg', 'identity', 'kxk']
    branches, _ = linear_of(spec, branches=names)
    assert [b.is_dense for b in branches.values()] == [True] + [False] * 5 + [
        True
    ]
    assert 'kxk_2' in branches
    # Of the two middle rows the 1x1 takes the one that the block's does.
    assert branches['1x1'].basis.reshape(2, 3).nonzero().tolist() == [[0, 1]]
    assert branches['1x1_avg'].basis.unique().tolist() == [1 / 6]
    assert branches['kx1'].basis.sum(0).tolist() == [0, 1, 0, 0, 1, 0]
    assert branches['identity'].basis.nonzero().tolist() == [
        [0, 0, 0, 1],
        [1, 1, 0, 1],
    ]
    assert not linear_of(dict(spec, kernel_size=2), branches=['1x1'])[0][
        '1x1'
    ].is_dense


def test_a_branch_of_ones_own_counts(monkeypatch):
    """Whether it is linear is found by probing it."""
    from mmdbb.branches.kxk import KxK
    from mmdbb.registry import BRANCHES
    from mmdbb.transforms import KernelBias

    monkeypatch.setattr(BRANCHES, 'module_dict', dict(BRANCHES.module_dict))

    class Mirrored(KxK):
        def equivalent_kernel_bias(self):
            kernel, bias = super().equivalent_kernel_bias()
            return KernelBias(kernel.flip(3), bias)

    class Squared(KxK):
        def equivalent_kernel_bias(self):
            kernel, bias = super().equivalent_kernel_bias()
            return KernelBias(kernel.square(), bias)

    BRANCHES.register_module('mirrored', module=Mirrored)
    BRANCHES.register_module('squared', module=Squared)
    spec = dict(in_channels=2, out_channels=2)
    branches, _ = linear_of(spec, branches=['mirrored'])
    expected = torch.eye(9).reshape(9, 3, 3).flip(2).reshape(9, 9)
    assert torch.equal(branches['mirrored'].basis, expected.double())
    assert not branches['mirrored'].is_dense
    with pytest.raises(ValueError, match="'squared' is not linear"):
        linear_of(spec, branches=['squared'])


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(block=dict(type='OREPA')), ValueError, 'composes its kernel'),
        (dict(branches='kxk'), TypeError, 'branches must be a list'),
        (dict(branches=[]), TypeError, 'branches must be a list'),
        (dict(branches=['1x1_kxk']), ValueError, "'1x1_kxk' is not linear"),
        (dict(branches=['identity']), ValueError, 'as many channels out'),
        (dict(scale_init=0), ValueError, 'scale_init must be a positive'),
        (dict(scale_init=True), ValueError, 'scale_init must be a positive'),
        (dict(train_scales=1), TypeError, 'train_scales must be True or'),
        (dict(foo=1), TypeError, 'unexpected keyword'),
    ],
)
def test_blocks_that_cannot_be_built(kwargs, error, message):
    with pytest.raises(error, match=message):
        LinearAddConv(2, 4, 3, **kwargs)


def test_a_stride_that_a_branch_does_not_serve():
    block = LinearAddConv(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match=r'do not serve.*\[.kxk., .1x1.\]'):
        block.stride = 2
    block.dilation = 2
    block.padding = 2
    x = torch.rand(1, 4, 7, 6)
    assert distance(block(x), block.forward_branches(x)) < 1e-5


def test_constant_scales_stay_constant():
    block = LinearAddConv(4, 4, 3, train_scales=False).requires_grad_(True)
    trained = [name for name, _ in block.named_parameters()]
    assert trained == [
        'bias',
        'generator.weights.kxk',
        'generator.weights.1x1',
        'generator.scales.identity',
    ]
    other = LinearAddConv(4, 4, 3, scale_init=2.0)
    scales = {
        key: value[0].item()
        for key, value in zip(
            other.generator.scales, other.generator.scales.values()
        )
    }
    assert scales == dict(identity=1.0, kxk=2.0) | {'1x1': 2.0}
    assert other.state_dict().keys() == block.state_dict().keys()
