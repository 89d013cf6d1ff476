"""Plain weights through any door: a block takes them, or says why not."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, distance, image, randomize
from mmengine.model import BaseModule, ExponentialMovingAverage
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from mmdbb import (
    DBB,
    insert_blocks_,
    load_plain_weights_,
    merge_into_,
    reparameterize,
)
from mmdbb.blocks import OREPAConv, QARepVGGConv
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.errors import UserError
from mmdbb.reparam import literal_forward

pytestmark = pytest.mark.usefixtures('quiet')


class Plain(nn.Module):
    """Names that tell nothing, norms before and behind, one with its eps."""

    def __init__(self, bias=False):
        super().__init__()
        self.second = nn.BatchNorm2d(6, eps=0.3)
        self.a = nn.Conv2d(4, 6, 3, bias=bias)
        self.b = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=bias)
        self.first = nn.BatchNorm2d(6, eps=0.1)
        self.last = nn.Conv2d(6, 5, 3)

    def forward(self, x):
        y = F.relu(self.first(self.a(x)))
        return self.last(F.relu(self.second(self.b(y))))


X = image(2, 4, 11, 9)


def plain_network(seed=0, bias=False):
    torch.manual_seed(seed)
    return randomize(Plain(bias), seed).double().eval()


def with_blocks(seed=0, bias=False, **block):
    model = plain_network(seed, bias)
    insert_blocks_(model, dict(dict(type='DBB'), **block))
    return model


@torch.no_grad()
def same(model, plain):
    model.eval()
    with literal_forward(model):
        return distance(model(X), plain(X)) < EXACT


def by_torch(strict):
    def load(model, state):
        keys = model.load_state_dict(state, strict=strict)
        assert not keys.missing_keys and not keys.unexpected_keys

    return load


def by_assigning(model, state):
    model.load_state_dict(state, assign=True)


def by_mmengine(strict):
    def load(model, state):
        file = io.BytesIO()
        torch.save(dict(state_dict=state), file)
        path = model.folder / 'plain.pth'
        path.write_bytes(file.getvalue())
        load_checkpoint(model, str(path), strict=strict)

    return load


def by_runner(model, state):
    path = model.folder / 'plain.pth'
    torch.save(dict(state_dict=state), path)
    runner = Runner(
        model, str(model.folder), load_from=str(path), log_level='ERROR'
    )
    runner.load_or_resume()


def averaged(model, state):
    wrapped = ExponentialMovingAverage(model)
    named = {f'module.{n}': v for n, v in state.items()}
    wrapped.load_state_dict(dict(named, steps=torch.zeros(1)))
    model.load_state_dict(wrapped.module.state_dict())


def compiled(model, state):
    wrapped = torch.compile(model, backend='eager')
    wrapped.load_state_dict({f'_orig_mod.{n}': v for n, v in state.items()})


def copied(model, state):
    """The copy's memory is of the copy, not of its original."""
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    before = copy.deepcopy(model.state_dict())
    twin.load_state_dict(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.load_state_dict(twin.state_dict())


def by_function(model, state):
    loaded = load_plain_weights_(model, state)
    assert loaded[1:] == ([], [], [])


def in_a_whole(model, state):
    whole = nn.ModuleDict(dict(model=model))
    load_plain_weights_(whole, {f'model.{n}': v for n, v in state.items()})


DOORS = {
    'strict': by_torch(True),
    'not strict': by_torch(False),
    'assign': by_assigning,
    'mmengine': by_mmengine(False),
    'mmengine, strict': by_mmengine(True),
    'Runner': by_runner,
    'averaged': averaged,
    'compiled': compiled,
    'copied': copied,
    'load_plain_weights_': by_function,
    'load_plain_weights_ in a whole': in_a_whole,
}


@pytest.mark.parametrize('door', DOORS)
def test_absorbed_norms_come_in(door, tmp_path):
    model, plain = with_blocks(), plain_network(7)
    for name in ('first', 'second'):
        assert type(model.get_submodule(name)) is AbsorbedNorm
    model.folder = tmp_path
    assert not same(model, plain)
    DOORS[door](model, plain.state_dict())
    assert same(model, plain)
    assert all(p.dtype is torch.float64 for p in model.parameters())


@pytest.mark.parametrize(
    'block',
    [
        dict(type='ACB'),
        dict(type='RepVGGConv'),
        dict(type='OREPARepVGG'),
        dict(type='OREPA'),
        # The block's own eps is not that of the norm that it absorbed.
        dict(norm_cfg=dict(type='BN', eps=1e-4)),
    ],
    ids=str,
)
@pytest.mark.parametrize('bias', [False, True])
def test_each_kind_of_block(block, bias):
    plain = plain_network(7, bias)
    for load in (by_torch(True), by_function):
        model = with_blocks(bias=bias, **block)
        load(model, plain.state_dict())
        assert same(model, plain)


def test_merged_blocks_take_them_too():
    model, plain = with_blocks(), plain_network(7)
    for name in ('a', 'b', 'last'):
        model.get_submodule(name).switch_to_deploy()
    by_torch(True)(model, plain.state_dict())
    assert same(model, plain)


@pytest.mark.parametrize('strict', [True, False])
def test_a_file_of_merged_blocks_is_refused(strict):
    """Its entries have no place in branches, which would stay random."""
    model, merged = with_blocks(1), with_blocks()
    merged.a.switch_to_deploy()
    before = copy.deepcopy(model.a.state_dict())
    with pytest.raises(UserError, match=r'merged block at a .a.reparam_conv'):
        model.load_state_dict(merged.state_dict(), strict=strict)
    for name, value in model.a.state_dict().items():
        assert torch.equal(value, before[name])
    model.a.switch_to_deploy()
    model.load_state_dict(merged.state_dict())
    assert distance(model(X), merged(X)) < EXACT


def test_own_entries_load_as_ever():
    model, other = with_blocks(), randomize(with_blocks(3), 3)
    state = copy.deepcopy(other.state_dict())
    by_torch(True)(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    keys = model.load_state_dict(
        dict(state, **{'a.weight': torch.ones(1)}), strict=False
    )
    assert keys.unexpected_keys == ['a.weight']
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_what_is_missing_is_named():
    model, plain = with_blocks(), plain_network(7)
    state = plain.state_dict()
    for name in ('first.running_var', 'second.weight', 'last.bias'):
        del state[name]
    keys = model.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert set(keys.missing_keys) == {
        'first.running_var',
        'second.weight',
        'last.bias',
    }
    # As in the plain network, where they are those of a new norm.
    nn.init.ones_(plain.first.running_var)
    nn.init.ones_(plain.second.weight)
    nn.init.zeros_(plain.last.bias)
    assert same(model, plain)


@pytest.mark.parametrize('name', ['first', 'second'])
def test_a_norm_that_is_missing_is_named(name):
    model, plain = with_blocks(), plain_network(7)
    state = {
        n: v for n, v in plain.state_dict().items() if not n.startswith(name)
    }
    # The plain network would keep its norm, which a block cannot.
    with pytest.raises(UserError, match=f'BatchNorm2d at {name}, too, but no'):
        model.load_state_dict(state, strict=False)
    names = ('running_mean', 'running_var', 'weight', 'bias')
    # Part of a norm is taken as the plain network takes it.
    state[f'{name}.running_mean'] = plain.state_dict()[f'{name}.running_mean']
    keys = model.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert keys.missing_keys == [f'{name}.{entry}' for entry in names[1:]]
    norm = getattr(plain, name)
    new = nn.BatchNorm2d(6, eps=norm.eps).double().eval()
    new.running_mean.copy_(norm.running_mean)
    setattr(plain, name, new)
    assert same(model, plain)


@pytest.mark.parametrize('norm_first', [False, True])
def test_a_merged_file_starts_blocks_that_absorbed_norms(norm_first):
    """Its convolutions hold the norms, of which it has no entries."""
    model = with_blocks(1)
    merged = reparameterize(with_blocks(2))
    own = [*model.state_dict()]
    if norm_first:  # the order in which a load comes to them
        model._modules = dict(reversed(model._modules.items()))
    keys = model.load_state_dict(merged.state_dict(), strict=False)
    assert same(model, merged)
    assert keys.unexpected_keys == []
    # Reported all the same: the file may lack them by mistake.
    assert 'first.running_mean' in keys.missing_keys
    assert not {*keys.missing_keys} & {*own}


def test_a_norm_for_nobody_is_unexpected():
    for names in (('first', 'second'), ('second',)):
        model = with_blocks()
        before = copy.deepcopy(model.state_dict())
        state = {
            n: v
            for n, v in plain_network(7).state_dict().items()
            if n.startswith(names)
        }
        keys = model.load_state_dict(state, strict=False)
        assert set(keys.unexpected_keys) == set(state)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])


def test_one_after_the_other():
    """A convolution by itself, then the norm by itself."""
    model, plain = with_blocks(), plain_network(7)
    by_torch(True)(model.a, plain.a.state_dict())
    assert distance(model.a.eval()(X), plain.a(X)) < EXACT
    # Another load does not take what that one left.
    model.load_state_dict(plain.first.state_dict(), strict=False)
    assert distance(model.a(X), plain.a(X)) < EXACT


def test_shapes_that_do_not_fit():
    model, state = with_blocks(), plain_network(7).state_dict()
    for name, shape in (
        ('a.weight', (6, 4, 1, 1)),
        ('last.bias', (7,)),
        ('first.running_mean', (7,)),
        ('second.bias', (7,)),
    ):
        wrong = dict(state, **{name: torch.ones(shape)})
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(wrong, strict=False)
        lines = str(error.value).splitlines()
        assert len(lines) == 2 and f'size mismatch for {name}' in lines[1]


@pytest.mark.parametrize(
    ('block', 'state', 'message'),
    [
        (DBB(4, 4, 3, branches=['1x1']), {}, "no 'kxk' branch"),
        (QARepVGGConv(4, 4, 3), {}, 'norm after its sum'),
        (OREPAConv(4, 4, 3, bias=False), {}, 'has a bias, the block none'),
        (OREPAConv(4, 4, 7), {}, 'max_kernel_size'),
        (DBB(4, 4, 3).to('meta'), {}, 'on the meta device'),
        (
            DBB(4, 4, 3),
            {'conv.branches.kxk.norm.weight': torch.ones(4)},
            'some of the entries of its branches',
        ),
    ],
)
@pytest.mark.parametrize('mm', [False, True])
def test_refuses_with_the_reason(block, state, message, mm, tmp_path):
    size = block.kernel_size
    plain = nn.ModuleDict(dict(conv=nn.Conv2d(4, 4, size)))
    model = nn.ModuleDict(dict(conv=block))
    model.folder = tmp_path
    state = dict(plain.state_dict(), **state)
    with pytest.raises(UserError, match=f'for conv.*{message}'):
        if mm:
            by_mmengine(False)(model, state)
        else:
            model.load_state_dict(state, strict=False)


def test_nothing_is_left_behind():
    model, plain = with_blocks(), plain_network(7)
    model.a.load_state_dict(plain.a.state_dict())
    kept = len(pickle.dumps(model.first))
    model.load_state_dict(plain.state_dict())
    assert len(pickle.dumps(model.first)) == kept
    for merged in (reparameterize(model), reparameterize(model, inplace=True)):
        kinds = {type(module) for module in merged.modules()}
        assert kinds == {Plain, nn.Conv2d, nn.Identity}


def test_a_forgotten_norm_is_refused():
    model, plain = plain_network(), plain_network(7)
    model.a = DBB(4, 6, 3).double()
    model.first = nn.Identity()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match='norms where .* nn.Identity: first'):
        load_plain_weights_(model, plain.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Versioned(nn.BatchNorm2d):
    """Its older entries are converted."""

    _version = 3

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get('version', 1) < 3:
            state[f'{prefix}weight'] = state[f'{prefix}weight'] * 100
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_versions_of_layers_are_kept():
    plain = plain_network()
    plain.last = nn.Sequential(plain.last, Versioned(5)).double().eval()
    model = copy.deepcopy(plain)
    insert_blocks_(model)
    randomize(model, 2)
    assert distance(merge_into_(plain, model)(X), model(X)) < EXACT


def test_the_readmes_lines_on_a_detector(tmp_path):
    """init_cfg of type Pretrained, frozen stages, a real detector."""
    import mmdet.models  # noqa: F401

    small = dict(depth=18, base_channels=4, stem_channels=4)
    backbone = dict(
        type='mmdet.ResNet',
        num_stages=4,
        frozen_stages=1,
        norm_eval=True,
        **small,
    )
    torch.manual_seed(0)
    plain = randomize(MODELS.build(backbone))
    path = str(tmp_path / 'resnet.pth')
    torch.save(plain.state_dict(), path)
    neck = dict(
        type='mmdet.FPN',
        in_channels=[4, 8, 16, 32],
        out_channels=4,
        num_outs=5,
    )
    head = dict(
        type='mmdet.RetinaHead',
        num_classes=2,
        in_channels=4,
        feat_channels=4,
        anchor_generator=dict(
            type='mmdet.AnchorGenerator',
            scales=[4],
            ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
    )
    blocks = dict(conv_cfg=dict(type='DBB'))
    start = dict(type='Pretrained', checkpoint=path)
    model = MODELS.build(
        dict(
            type='mmdet.RetinaNet',
            backbone=dict(backbone, init_cfg=start, **blocks),
            neck=dict(neck, **blocks),
            bbox_head=dict(head, **blocks),
        )
    )
    model.init_weights()
    frozen = model.backbone.layer1[0].conv1
    assert not any(p.requires_grad for p in frozen.parameters())
    plain.double(), model.double()
    plain.eval(), model.train()  # norm_eval
    x = image(1, 3, 40, 33)
    with torch.no_grad(), literal_forward(model):
        for found, expected in zip(model.backbone(x), plain(x)):
            assert distance(found, expected) < 1e-4  # loaded in float32


def test_children_of_mmengines_modules(tmp_path):
    """Pretrained at any level: prefixes, and a rule of a parent."""

    class Parent(BaseModule):
        def __init__(self, init_cfg=None):
            super().__init__(init_cfg)
            self.conv = DBB(3, 3, 3)

    state = {
        'x.conv.weight': torch.ones(3, 3, 3, 3),
        'x.conv.bias': torch.ones(3),
    }
    torch.save(state, tmp_path / 'plain.pth')
    rule = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'plain.pth'), prefix='x.'
    )
    parent = Parent(rule)
    parent.init_weights()
    kernel, bias = parent.conv.get_equivalent_kernel_bias()
    assert torch.allclose(kernel, torch.ones(3, 3, 3, 3), atol=1e-5)
    assert torch.allclose(bias, torch.ones(3), atol=1e-5)
