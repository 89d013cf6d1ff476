"""What acts on a block from outside: hooks, masks, attributes set later."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import EXACT, distance, image, randomize
from registered import distinct_blocks
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from mmdbb import DBB, OREPAConv, QARepVGGConv, reparameterize

BLOCKS = distinct_blocks()

# Hooks


def record(calls, name):
    return lambda *args: calls.append(name)


def watch(module, calls):
    """A hook of every kind."""
    module.register_forward_pre_hook(record(calls, 'pre'))
    module.register_forward_hook(record(calls, 'forward'))
    module.register_full_backward_pre_hook(record(calls, 'backward pre'))
    module.register_full_backward_hook(record(calls, 'backward'))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'kind, inner',
    [
        (DBB, 'branches.1x1.norm'),
        (DBB, 'branches.1x1_kxk.conv2'),
        (DBB, 'branches.1x1_avg'),
        (QARepVGGConv, 'norm'),
    ],
)
def test_every_hook_is_called(kind, inner, training):
    block = randomize(kind(6, 6, 3, padding=1)).double().train(training)
    literal, calls = copy.deepcopy(block), []
    watch(block.get_submodule(inner), calls)
    x = image(2, 6, 9, 10).requires_grad_()
    y = image(2, 6, 9, 10).requires_grad_()
    a, b = block(x), literal.forward_branches(y)
    a.square().sum().backward(), b.square().sum().backward()
    assert calls == ['pre', 'forward', 'backward pre', 'backward']
    assert distance(a, b) < EXACT
    assert distance(x.grad, y.grad) < EXACT


@pytest.mark.parametrize(
    'kind',
    [
        'forward_pre_hook',
        'forward_hook',
        'full_backward_pre_hook',
        'full_backward_hook',
    ],
)
@pytest.mark.parametrize('inner', ['1x1.norm', '1x1_kxk.conv2', '1x1_avg'])
def test_a_hook_of_one_kind_alone_is_called(kind, inner):
    block = randomize(DBB(6, 6, 3, padding=1)).double()
    calls = []
    module = block.branches.get_submodule(inner)
    getattr(module, f'register_{kind}')(record(calls, kind))
    block(image(2, 6, 9, 10).requires_grad_()).square().sum().backward()
    assert calls == [kind]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    ('kind', 'inner'),
    [
        (DBB, 'branches.1x1.conv'),
        (DBB, 'branches.1x1_avg.norm1'),
        (DBB, 'branches.1x1_kxk.conv1'),
        (QARepVGGConv, 'norm'),
    ],
)
def test_a_forward_put_in_place_of_a_layers_own_is_obeyed(
    kind, inner, training
):
    block = randomize(kind(6, 6, 3, padding=1)).double().train(training)
    x = image(2, 6, 9, 10)
    before = copy.deepcopy(block)(x)
    layer = block.get_submodule(inner)
    calls, forward = [], layer.forward

    def other(x):
        calls.append(inner)
        return forward(x) + x.sum(1, keepdim=True).square()

    layer.forward = other
    found = block(x)
    assert calls == [inner]
    assert distance(found, before) > 1e-2


@pytest.mark.parametrize('training', [True, False])
def test_a_hook_that_changes_a_branch_is_obeyed_or_refused(training):
    block = randomize(DBB(6, 6, 3, padding=1)).double().train(training)
    x = image(2, 6, 9, 10)
    before = copy.deepcopy(block)(x)
    handle = block.branches['1x1'].register_forward_hook(
        lambda module, args, y: 0 * y
    )
    assert distance(copy.deepcopy(block)(x), before) > 1e-2
    state = copy.deepcopy(block.state_dict())
    for merge in (
        block.get_equivalent_kernel_bias,
        block.to_conv,
        block.switch_to_deploy,
        lambda: reparameterize(block),
    ):
        with pytest.raises(ValueError, match='branches.1x1 has a hook'):
            merge()
    assert not block.deploy
    assert all(torch.equal(state[k], v) for k, v in block.state_dict().items())
    handle.remove()
    block.eval().switch_to_deploy()


def test_a_forward_put_in_place_of_a_layers_own_is_refused():
    block = DBB(4, 4, 3)
    conv = block.branches['kxk'].conv
    conv.forward = lambda x: nn.Conv2d.forward(conv, 2 * x)
    with pytest.raises(ValueError, match='kxk.conv has a hook, or a forward'):
        block.to_conv()

    class Standardized(nn.Conv2d):
        def forward(self, x):
            return super().forward(2 * x)

    block = randomize(DBB(6, 6, 3, padding=1)).double()
    layer = Standardized(6, 6, 1, bias=False).double()
    block.branches['1x1'].conv = layer
    twin, x = copy.deepcopy(block), image(2, 6, 9, 10)
    assert distance(block(x), twin.forward_branches(x)) < EXACT
    with pytest.raises(ValueError, match='1x1.conv has a hook, or a forward'):
        block.to_conv()


class CentredConv(nn.Conv2d):
    """A layer whose forward uses its weight in a way of its own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('groups', [1, 6])
@pytest.mark.parametrize('name', BLOCKS)
def test_layers_with_a_forward_of_their_own(name, groups, training):
    """Replaced after construction, as for quantization or low rank."""
    block = randomize(BLOCKS[name](6, 6, 3, padding=1, groups=groups))
    block = block.double().train(training)
    changed = False
    for layer in block.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__, changed = CentredConv, True
        elif type(layer) is nn.BatchNorm2d and not changed:
            layer.__class__, changed = DoublingNorm, True
    twin = copy.deepcopy(block)
    x = image(2, 6, 9, 10).requires_grad_()
    y = image(2, 6, 9, 10).requires_grad_()
    a, b = block(x), twin.forward_branches(y)
    a.square().sum().backward(), b.square().sum().backward()
    assert distance(a, b) < EXACT
    assert distance(x.grad, y.grad) < EXACT
    with torch.no_grad():
        assert distance(block(x), twin.forward_branches(x)) < EXACT
    if changed:
        with pytest.raises(ValueError, match='or a forward of its own'):
            block.to_conv()


@pytest.mark.parametrize('grad', [True, False])
def test_a_norm_taken_out_leaves_the_input_alone(grad):
    block = BLOCKS['RepVGGConv'](6, 6, 3, padding=1)
    block.branches['identity'].norm = nn.Identity()
    x = torch.rand(2, 6, 9, 10, requires_grad=grad)
    before = x.detach().clone()
    twin = copy.deepcopy(block)
    assert torch.equal(block(x), twin.forward_branches(x))
    assert torch.equal(x, before)


def test_a_norm_without_statistics():
    """As torch.func's replacement for batch norms leaves it."""
    for name in ('RepVGGConv', 'DBB'):
        block = BLOCKS[name](6, 6, 3, padding=1)
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean = norm.running_var = None
                norm.track_running_stats = False
        x = torch.rand(2, 6, 9, 10)
        if name == 'DBB':
            with pytest.raises(ValueError, match='has lost them'):
                block(x)
        else:
            assert torch.equal(block(x), block.forward_branches(x))


def test_other_threads_never_see_a_block_change():
    """Whatever composes or computes again does so on a twin."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            half = DBB(8, 8, 3, padding=1).bfloat16().eval()
            trained = DBB(8, 8, 3, padding=1, groups=8)
            x = torch.rand(2, 8, 12, 13)

            def evaluate(half=half, x=x):
                with torch.no_grad():
                    return half(x.bfloat16()).dtype

            def train(trained=trained, x=x):
                trained(x).square().sum().backward()
                return all(
                    type(p) is nn.Parameter for p in trained.parameters()
                )

            with ThreadPoolExecutor(6) as pool:
                runs = [pool.submit(evaluate) for _ in range(4)]
                steps = [pool.submit(train) for _ in range(4)]
            assert {run.result() for run in runs} == {torch.bfloat16}
            assert all(step.result() for step in steps)
            assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
            assert all(p.grad is not None for p in trained.parameters())
    finally:
        sys.setswitchinterval(before)


def test_a_pruned_bias_of_the_block_itself():
    block = randomize(OREPAConv(4, 6, 3)).eval()
    prune.l1_unstructured(block, 'bias', 2)
    with torch.no_grad():
        block.bias_orig.add_(1)
    x = image(2, 4, 6, 7, dtype=torch.float32)
    merged = reparameterize(nn.Sequential(block))(x)
    assert distance(merged, block(x)) < 1e-5


@pytest.mark.parametrize('inplace', [True, False])
def test_hooks_on_a_block_stay_with_its_convolution(inplace):
    net = nn.Sequential(DBB(4, 4, 3), nn.ReLU()).eval()
    calls = []
    net[0].register_forward_pre_hook(record(calls, 'pre'))
    net[0].register_forward_hook(
        lambda module, args, kwargs, y: calls.append('kwargs'),
        with_kwargs=True,
    )
    reparameterize(net, inplace=inplace)(torch.rand(1, 4, 6, 6))
    assert calls == ['pre', 'kwargs']


# Weights that are computed before each forward pass


def pruned(module, name):
    return prune.l1_unstructured(module, name, amount=0.5)


COMPUTED = dict(
    prune=pruned,
    weight_norm=weight_norm,
    spectral_norm=spectral_norm,
    parametrized_weight_norm=parametrizations.weight_norm,
    parametrized_spectral_norm=parametrizations.spectral_norm,
)
PLACES = [
    (DBB, 'branches.kxk.conv', 'weight'),
    (DBB, 'branches.1x1.conv', 'weight'),
    (DBB, 'branches.1x1_kxk.conv2', 'weight'),
    (OREPAConv, 'generator', 'origin'),
]


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('kind, inner, name', PLACES)
@pytest.mark.parametrize('how', COMPUTED)
def test_merged_as_forward_computes_after_a_step(how, kind, inner, name):
    """The optimizer's last step counts, whoever asks first."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        block = randomize(kind(6, 6, 3, padding=1)).double()
        COMPUTED[how](block.get_submodule(inner), name)
        nets.append(block)
    block, twin = nets
    # The literal sum of a composed kernel reads no weights that hooks made.
    literal = twin if kind is OREPAConv else twin.forward_branches
    x = image(3, 6, 9, 10)
    for net, forward in ((block, block), (twin, literal)):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        y = forward(x)
        (y * image(*y.shape, seed=1)).sum().backward()
        optimizer.step()
    pairs = zip(block.named_parameters(), twin.parameters())
    scale = max(p.grad.abs().max() for p in twin.parameters())
    for (key, p), q in pairs:
        assert (p.grad - q.grad).abs().max() < EXACT * scale, key
    block.eval(), twin.eval()
    conv = block.to_conv()
    kernel, bias = block.get_equivalent_kernel_bias()
    expected = literal(x)
    assert distance(conv(x), expected) < EXACT
    assert distance(kernel, conv.weight) < EXACT
    with torch.no_grad():
        assert distance(block(x), expected) < EXACT
    net = nn.Sequential(block)
    merged = reparameterize(net, inplace=True)
    assert distance(merged(x), expected) < EXACT


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('refused', [False, True])
@pytest.mark.parametrize('how', ['prune', 'weight_norm', 'spectral_norm'])
def test_merging_leaves_computed_weights_as_they_stood(how, refused):
    """Of before the last step: who reads one sees what forward left there."""
    block = DBB(4, 4, 3).eval()
    conv = block.branches['kxk'].conv
    COMPUTED[how](conv, 'weight')
    block(torch.rand(1, 4, 6, 6))
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(-2)
    stood = vars(conv)['weight']
    values = stood.detach().clone()
    if refused:
        block.branches['1x1_kxk'].register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match='1x1_kxk has a hook'):
            block.get_equivalent_kernel_bias()
    else:
        block.get_equivalent_kernel_bias()
    assert vars(conv)['weight'] is stood
    assert torch.equal(stood, values)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('kind', [DBB, OREPAConv])
@pytest.mark.parametrize('training', [False, True])
def test_a_weight_norm_of_the_block_itself_is_refused(kind, training):
    block = kind(4, 4, 3, padding=1).train(training)
    entries = [*block.state_dict()]
    with pytest.raises(ValueError, match=f'weight of a {kind.__name__} is co'):
        weight_norm(block)
    assert [*block.state_dict()] == entries
    assert block(torch.rand(2, 4, 6, 6)).shape == (2, 4, 6, 6)


@pytest.mark.parametrize('inner', ['generator', 'branches.orepa.generator'])
def test_a_stateful_parametrization_takes_one_step(inner):
    """A spectral norm moves its vectors whenever its weight is read."""
    kind = OREPAConv if inner == 'generator' else BLOCKS['OREPARepVGG']
    grads = []
    for literal in (False, True):
        torch.manual_seed(0)
        block = randomize(kind(6, 6, 3, padding=1)).double()
        module = block.get_submodule(inner)
        parametrizations.spectral_norm(module, 'origin')
        x = image(3, 6, 9, 10)
        y = block.forward_branches(x) if literal else block(x)
        (y * image(*y.shape, seed=1)).sum().backward()
        grads.append([p.grad for p in block.parameters()])
    scale = max(g.abs().max() for g in grads[1])
    for p, q in zip(*grads):
        assert (p - q).abs().max() < EXACT * scale


# The kept kernel


@pytest.mark.parametrize('name', BLOCKS)
def test_the_kept_kernel_follows_eps(name):
    block = randomize(BLOCKS[name](4, 4, 3, padding=1)).double().eval()
    x = image(2, 4, 6, 7)
    with torch.no_grad():
        block(x)
        for module in block.modules():
            if hasattr(module, 'eps'):
                module.eps = 0.3
        assert distance(block(x), block.forward_branches(x)) < EXACT


def test_the_kept_kernel_follows_a_branch_that_is_deleted():
    block = randomize(QARepVGGConv(4, 4, 3, padding=1)).double().eval()
    x = image(2, 4, 6, 7)
    with torch.no_grad():
        before = block(x)
        del block.branches['identity']
        after = block(x)
        assert distance(after, before) > 1e-3
        assert distance(after, block.forward_branches(x)) < EXACT


# Attributes that hosts set on a built network


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('deploy', [True, False])
@pytest.mark.parametrize(
    'changes',
    [
        dict(stride=(1, 1), dilation=(2, 2), padding=(2, 2)),
        dict(padding=(0, 1)),
        dict(stride=3, padding=2),
        dict(padding_mode='reflect'),
    ],
)
def test_geometry_can_be_set(name, deploy, changes):
    """As torchvision and the papers' segmentors dilate a network."""
    block = randomize(BLOCKS[name](4, 6, 3, 2, 1)).double()
    built = BLOCKS[name](
        4, 6, 3, **{**dict(stride=2, padding=1), **changes}
    ).double()
    built.load_state_dict(block.state_dict())
    if deploy:
        block.eval().switch_to_deploy(), built.eval().switch_to_deploy()
    for attribute, value in changes.items():
        setattr(block, attribute, value)
        assert getattr(block, attribute) == getattr(built, attribute)
    x = image(3, 4, 11, 12)
    for training in (True, False):
        block.train(training), built.train(training)
        assert distance(block(x), built(x)) < EXACT
        if not deploy:
            assert distance(block.forward_branches(x), built(x)) < EXACT
    assert distance(block.to_conv()(x), built(x)) < EXACT


def test_geometry_set_on_all_layers_of_a_network():
    """Segmentors walk over the layers inside blocks too."""

    def dilate(module):
        if 'Conv' in type(module).__name__ or isinstance(module, DBB):
            if module.kernel_size == (3, 3):
                module.dilation, module.padding = (2, 2), (2, 2)

    net = nn.Sequential(DBB(4, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    randomize(net).apply(dilate)
    built = randomize(DBB(4, 4, 3, padding=2, dilation=2).double())
    built.load_state_dict(net[0].state_dict())
    x = image(2, 4, 9, 10)
    assert distance(net[0](x), built(x)) < EXACT


def test_what_cannot_be_set_says_so():
    block = DBB(4, 4, 3, padding=1)
    block.kernel_size = (3, 3)  # no change
    with pytest.raises(ValueError, match='kernel_size of a DBB is fixed'):
        block.kernel_size = 5
    with pytest.raises(ValueError, match='groups of a DBB is fixed'):
        block.groups = 4
    with pytest.raises(ValueError, match='stride must be'):
        block.stride = 0
    repvgg = BLOCKS['RepVGGConv'](4, 4, 3, padding=1)
    with pytest.raises(ValueError, match="branch 'identity' needs stride 1"):
        repvgg.stride = 2
    assert repvgg.stride == (1, 1)
    block.branches['kxk'].conv.stride = (2, 2)
    for use in (lambda: block(torch.rand(2, 4, 8, 8)), block.to_conv):
        with pytest.raises(ValueError, match='set it on the block'):
            use()


# Inputs


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('grad', [True, False])
def test_one_image_without_a_batch(name, grad):
    block = randomize(BLOCKS[name](4, 6, 3, padding=1)).double().eval()
    x = image(1, 4, 8, 9)
    with torch.set_grad_enabled(grad):
        y = block(x[0])
        assert y.shape == (6, 8, 9)
        assert distance(y[None], block.forward_branches(x)) < EXACT
    block.train()
    twin = copy.deepcopy(block)
    assert distance(block(x[0])[None], twin.forward_branches(x)) < EXACT


@pytest.mark.parametrize('shape', [(4, 4), (1, 4, 4, 8, 8)])
def test_other_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match=r'images of shape \(N, C, H, W\)'):
        DBB(4, 4, 3)(torch.rand(shape))


def test_integers_of_numpy_are_integers():
    size, channels = (np.int64(3), 3), dict(internal_channels=np.int64(8))
    block = DBB(
        np.int64(4),
        np.int32(6),
        size,
        padding=np.int8(1),
        branches=['kxk', dict(type='1x1_kxk', **channels)],
    )
    assert block(torch.rand(2, 4, 5, 6)).shape == (2, 6, 5, 6)
    assert type(block.in_channels) is int


def test_sequences_are_as_torch_takes_them():
    arguments = dict(stride=[2], padding=(1,), dilation=np.array([1, 1]))
    block = DBB(4, 6, 3, **arguments)
    conv = nn.Conv2d(4, 6, 3, **arguments)
    x = torch.rand(2, 4, 5, 6)
    assert block(x).shape == conv(x).shape
    # torch builds this one, but cannot run it.
    with pytest.raises(ValueError, match='kernel_size must be 2 numbers or'):
        DBB(4, 6, (3,))
    for wrong in (None, {}, '3', 1.0):
        with pytest.raises(TypeError, match='kernel_size must be an int or'):
            DBB(4, 6, wrong)
    with pytest.raises(TypeError, match='padding must be an int.*got None'):
        DBB(4, 6, 3, padding=None)
    with pytest.raises(ValueError, match='not for an nn.Conv3d, as DBB3d d'):
        DBB(4, 6, (1, 7, 7))


def test_maps_of_a_conv1d_are_refused():
    with pytest.raises(ValueError, match='it stands for an nn.Conv2d'):
        DBB(4, 4, 3, padding=1)(torch.rand(2, 4, 30))


@pytest.mark.parametrize('kind', ['BN1d', 'BN3d'])
def test_norms_of_other_dimensions_are_refused(kind):
    with pytest.raises(ValueError, match='does not take images'):
        DBB(4, 4, 3, norm_cfg=dict(type=kind))
