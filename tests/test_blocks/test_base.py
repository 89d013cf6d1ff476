"""What every block is: a convolution to its host, and mergeable."""

import copy
import pickle

import pytest
import torch
from helpers import EXACT, SINGLE, distance, image, randomize
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from registered import (
    each_block,
    has_identity,
    has_no_composed_kernel,
    has_norms,
    has_starts,
    keeps_its_kernel,
)
from torch import nn

from mmdbb.blocks import DBB, ReparamConv2d
from mmdbb.reparam import literal_forward, reparameterize
from mmdbb.transforms import KernelBias

KINDS = each_block()
NORMED = each_block(has_norms)


def build(kind=DBB, dtype=torch.float64, **arguments):
    arguments = dict(padding=1, **arguments)
    return randomize(kind(4, 4, 3, **arguments).to(dtype)).eval()


# As a convolution


@KINDS
def test_attributes_are_those_of_conv2d(kind):
    arguments = (4, 8, (3, 5), (2, 1), (1, 2), 2, 2)
    block, conv = kind(*arguments), nn.Conv2d(*arguments)
    for name in (
        'in_channels out_channels kernel_size stride padding dilation '
        'groups padding_mode transposed output_padding'
    ).split():
        assert getattr(block, name) == getattr(conv, name), name


@KINDS
def test_positional_arguments_are_those_of_conv2d(kind):
    block = kind(4, 8, 3, 2, 1, 1, 2, False, 'reflect')
    assert block.spec.padding_mode == 'reflect'
    assert block.spec.groups == 2


def test_a_block_must_say_what_it_computes():
    base = ReparamConv2d(4, 8, 3)
    with pytest.raises(NotImplementedError):
        base(image(2, 4, 5, 6))
    with pytest.raises(NotImplementedError):
        base.get_equivalent_kernel_bias()


class Scaled(ReparamConv2d):
    """No sum, and so no other way to compute it than in training."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.deploy:
            self.conv = nn.Conv2d(**self.spec.conv_args)
            self.scale = nn.Parameter(torch.tensor(3.0))

    def forward_train(self, x):
        return self.scale * self.conv(x)

    def _compose(self):
        return KernelBias(
            self.scale * self.conv.weight, self.scale * self.conv.bias
        )


def test_a_block_that_is_no_sum_is_verified_too():
    block = build(Scaled)
    x = image(2, 4, 5, 6)
    expected = block.forward_branches(x)
    assert torch.equal(block(x), expected)
    with literal_forward(nn.Sequential(block)) as model:
        assert torch.equal(model(x), expected)
    assert distance(reparameterize(block)(x), expected) < EXACT


# Merging


@KINDS
def test_merged_convolution(kind):
    block = build(kind)
    x = image(2, 4, 5, 6)
    expected = block(x)
    conv = block.to_conv()
    assert type(conv) is nn.Conv2d
    assert not block.deploy
    assert distance(conv(x), expected) < EXACT
    assert all(p.requires_grad for p in conv.parameters())
    block.switch_to_deploy()
    assert block.deploy
    assert list(dict(block.named_modules())) == ['', 'reparam_conv']
    assert distance(block(x), expected) < EXACT


@KINDS
def test_switch_to_deploy_twice(kind):
    block = build(kind)
    block.switch_to_deploy()
    conv = block.reparam_conv
    weight = conv.weight.detach().clone()
    block.switch_to_deploy()
    assert block.reparam_conv is conv
    assert torch.equal(conv.weight, weight)


@KINDS
@pytest.mark.parametrize('training', [True, False])
def test_merged_keeps_the_mode_and_wants_gradients(kind, training):
    block = build(kind).train(training)
    for parameter in block.parameters():
        parameter.requires_grad = False
    block.switch_to_deploy()
    assert block.reparam_conv.training is training
    assert block.training is training
    assert all(p.requires_grad for p in block.parameters())


@KINDS
@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_merged_keeps_the_dtype(kind, dtype):
    block = build(kind, dtype)
    assert block.to_conv().weight.dtype == dtype
    assert block.to_conv().bias.dtype == dtype
    kernel, bias = block.get_equivalent_kernel_bias()
    assert kernel.dtype == bias.dtype == dtype


def test_merged_kernel_is_composed_in_float64():
    block = build(dtype=torch.float32)
    exact = copy.deepcopy(block).double().get_equivalent_kernel_bias()
    conv = block.to_conv()
    assert torch.equal(conv.weight, exact.kernel.float())
    assert torch.equal(conv.bias, exact.bias.float())


@KINDS
def test_merging_leaves_the_block_as_it_was(kind):
    block = build(kind, torch.float32)
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    before = copy.deepcopy(block.state_dict())
    block.to_conv()
    after = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    assert list(after) == list(tensors)
    assert all(after[name] is tensors[name] for name in tensors)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


def test_failed_merging_leaves_the_block_as_it_was(monkeypatch):
    block = build(dtype=torch.float32)

    def fail():
        # A twin is composed: other threads never see the block change.
        assert {p.dtype for p in block.parameters()} == {torch.float32}
        raise KeyError

    monkeypatch.setattr(block, '_compose', fail)
    with pytest.raises(KeyError):
        block.to_conv()
    assert {p.dtype for p in block.parameters()} == {torch.float32}


def test_merged_kernel_shares_nothing_with_the_block():
    block = build()
    block.switch_to_deploy()
    conv = block.to_conv()
    for found, own in zip(conv.parameters(), block.reparam_conv.parameters()):
        assert torch.equal(found, own)
        assert found.data_ptr() != own.data_ptr()


def test_dtype_to_compose_in():
    block = build(dtype=torch.float32)
    single, double = block.to_conv(torch.float32), block.to_conv()
    assert single.weight.dtype == torch.float32
    composed = block.get_equivalent_kernel_bias()
    assert torch.equal(single.weight, composed.kernel)
    assert not torch.equal(single.weight, double.weight)
    assert distance(single.weight, double.weight) < SINGLE


@pytest.mark.parametrize('dtype', [torch.float16, torch.int64, 'float64'])
def test_other_dtypes_to_compose_in_are_refused(dtype):
    with pytest.raises(ValueError, match=r'dtype must be .*float32.*got'):
        build().to_conv(dtype)


def test_merged_mixed_dtypes_as_host_keeps_norms_in_float32():
    """fp16 hosts leave norms in float32: the kernels' dtype counts."""
    block = build(dtype=torch.float32)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.half()
    assert block.to_conv().weight.dtype == torch.float16


def test_equivalent_kernel_is_differentiable():
    block = build().train()
    kernel, bias = block.get_equivalent_kernel_bias()
    (kernel.sum() + bias.sum()).backward()
    assert all(p.grad is not None for p in block.parameters())


@each_block(has_starts)
@pytest.mark.parametrize('name', ['init_gamma', 'single_init'])
@pytest.mark.parametrize('deploy', [True, False])
def test_merged_there_is_nothing_to_initialise(kind, name, deploy):
    block = kind(4, 4, 3, deploy=deploy)
    block.switch_to_deploy()
    arguments = [0.5] if name == 'init_gamma' else []
    message = f'{kind.__name__} is merged: it has no gammas to initialise'
    with pytest.raises(ValueError, match=message):
        getattr(block, name)(*arguments)


def test_equivalent_kernel_of_a_merged_block():
    block = build()
    expected = block.get_equivalent_kernel_bias()
    block.switch_to_deploy()
    found = block.get_equivalent_kernel_bias()
    assert distance(found.kernel, expected.kernel) < EXACT
    assert distance(found.bias, expected.bias) < EXACT


@KINDS
def test_merging_does_not_disturb_the_random_numbers(kind):
    block = build(kind)
    state = torch.get_rng_state()
    block.to_conv()
    block.switch_to_deploy()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    'spoil',
    [
        lambda b: b.branches['kxk'].conv.weight.data.fill_(float('nan')),
        lambda b: b.branches['1x1'].norm.bias.data.fill_(float('inf')),
        lambda b: b.branches['1x1_avg'].norm1.running_var.fill_(-1.0),
    ],
)
def test_not_finite_is_an_error_and_changes_nothing(spoil):
    block = build()
    spoil(block)
    names = list(block.state_dict())
    with pytest.raises(ValueError, match='merged kernel is not finite'):
        block.switch_to_deploy()
    assert not block.deploy and list(block.state_dict()) == names


@KINDS
def test_deploy_builds_the_merged_convolution(kind):
    block = build(kind)
    x = image(2, 4, 5, 6)
    expected = block(x)
    block.switch_to_deploy()
    fresh = kind(4, 4, 3, padding=1, deploy=True).double()
    fresh.load_state_dict(block.state_dict())
    assert distance(fresh(x), expected) < EXACT


# Copies and state


@KINDS
@pytest.mark.parametrize('merged', [False, True])
def test_state_dict_round_trip(kind, merged):
    block = build(kind)
    if merged:
        block.switch_to_deploy()
    other = kind(4, 4, 3, padding=1, deploy=merged).double().eval()
    result = other.load_state_dict(block.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    x = image(2, 4, 5, 6)
    assert torch.equal(other(x), block(x))


@KINDS
@pytest.mark.parametrize('merged', [False, True])
@pytest.mark.parametrize(
    'duplicate',
    [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))],
    ids=['deepcopy', 'pickle'],
)
def test_copies(kind, merged, duplicate):
    block = build(kind)
    if merged:
        block.switch_to_deploy()
    other = duplicate(block)
    x = image(2, 4, 5, 6)
    assert torch.equal(other(x), block(x))
    ours = {p.data_ptr() for p in block.parameters()}
    assert not ours & {p.data_ptr() for p in other.parameters()}


@KINDS
def test_meta_device(kind):
    with torch.device('meta'):
        block = kind(4, 4, 3, padding=1)
    assert all(p.is_meta for p in block.parameters())
    x = torch.empty(2, 4, 5, 6, device='meta')
    assert block(x).shape == (2, 4, 5, 6)
    conv = block.to_conv()
    assert all(p.is_meta for p in conv.parameters())
    assert conv(x).shape == (2, 4, 5, 6)
    block.switch_to_deploy()
    assert block(x).shape == (2, 4, 5, 6)
    block.to_empty(device='cpu')


@each_block(keeps_its_kernel)
def test_a_kernel_kept_in_inference_mode_serves_gradients(kind):
    """Tensors made in that mode cannot be saved for a backward pass."""
    block = build(kind).requires_grad_(False)
    x = image(2, 4, 5, 6)
    with torch.inference_mode():
        block(x)
    kept = block._cached_kernel
    assert not any(t.is_inference() for t in [*kept.values, *kept.merged])
    x.requires_grad_()
    block(x).square().sum().backward()
    other = x.detach().requires_grad_()
    block.forward_branches(other).square().sum().backward()
    assert distance(x.grad, other.grad) < EXACT


# Precision


@KINDS
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('training', [True, False])
def test_half_modules(kind, dtype, training):
    block = build(kind, dtype).train(training)
    exact = copy.deepcopy(block).double()
    x = image(2, 4, 5, 6, dtype=dtype)
    y = block(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    # Some roundings each of a branch's numbers, before they cancel.
    tolerance = 16 * torch.finfo(dtype).eps
    assert distance(y, exact(x.double())) < tolerance
    block.eval()
    merged = block.to_conv()(x)
    assert merged.dtype == dtype
    assert distance(merged, block(x)) < tolerance


@KINDS
@pytest.mark.parametrize('training', [True, False])
def test_autocast(kind, training):
    block = build(kind, torch.float32).train(training)
    exact = copy.deepcopy(block).double()
    x = image(2, 4, 5, 6, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = block(x)
    # As in the papers' code, a norm or nothing keeps its input's precision.
    expected = torch.float32 if has_identity(kind) else torch.bfloat16
    assert y.dtype == expected
    y.float().square().mean().backward()
    for parameter in block.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    tolerance = 16 * torch.finfo(torch.bfloat16).eps
    assert distance(y, exact(x.double())) < tolerance


@each_block(has_no_composed_kernel)
def test_forward_moves_nothing_between_devices(kind):
    """No constant is kept in a buffer, nor copied in forward."""
    block = kind(4, 4, 3, padding=1)
    allowed = ('running_mean', 'running_var', 'num_batches_tracked')
    for name, _ in block.named_buffers():
        assert name.endswith(allowed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@KINDS
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_on_a_gpu(kind, dtype):
    block = build(kind, dtype).cuda().train()
    x = image(2, 4, 5, 6, dtype=dtype).cuda().requires_grad_()
    with torch.profiler.profile() as profile:
        block(x).float().sum().backward()
    copies = [
        e.name
        for e in profile.events()
        if 'Memcpy HtoD' in e.name or 'Memcpy DtoH' in e.name
    ]
    assert not copies
    block.eval()
    conv = block.to_conv()
    assert conv.weight.is_cuda and conv.weight.dtype == dtype
    tolerance = EXACT if dtype == torch.float64 else 2e-2
    assert distance(conv(x).cpu(), block(x).cpu()) < tolerance


# Norms


@KINDS
def test_norms_are_real_batch_norms(kind):
    for module in kind(4, 4, 3).modules():
        if 'Norm' in type(module).__name__:
            assert type(module) is nn.BatchNorm2d


@NORMED
def test_sync_bn_merges(kind):
    block = build(kind, norm_cfg=dict(type='SyncBN'))
    norms = [m for m in block.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    x = image(2, 4, 5, 6)
    expected = block(x)
    block.switch_to_deploy()
    assert distance(block(x), expected) < EXACT


@KINDS
@pytest.mark.parametrize(
    'convert',
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        convert_sync_batchnorm,
        lambda b: revert_sync_batchnorm(convert_sync_batchnorm(b)),
    ],
    ids=['torch', 'mmengine', 'reverted'],
)
def test_converted_norms_merge(kind, convert):
    block = build(kind)
    x = image(2, 4, 5, 6)
    expected = block(x)
    block = convert(block).double().eval()
    assert distance(block(x), expected) < EXACT
    block.train()
    if not any(isinstance(m, nn.SyncBatchNorm) for m in block.modules()):
        block(x)
    block.eval()
    expected = block.forward_branches(x)
    assert distance(block.to_conv()(x), expected) < EXACT


@NORMED
def test_affine_false_merges(kind):
    block = build(kind, norm_cfg=dict(type='BN', affine=False))
    x = image(2, 4, 5, 6)
    expected = block(x)
    block.switch_to_deploy()
    assert distance(block(x), expected) < EXACT


@NORMED
def test_no_running_statistics_says_why_not(kind):
    with pytest.raises(ValueError, match='function depends on the batch'):
        kind(4, 4, 3, norm_cfg=dict(type='BN', track_running_stats=False))


@KINDS
def test_mmcv_fuse_conv_bn_changes_nothing(kind):
    from mmcv.cnn import fuse_conv_bn

    block = build(kind)
    x = image(2, 4, 5, 6)
    expected = block(x)
    fused = fuse_conv_bn(copy.deepcopy(block))
    assert distance(fused(x), expected) < EXACT
    model = nn.Sequential(nn.Conv2d(4, 4, 1), block).double().eval()
    expected = model(x)
    assert distance(fuse_conv_bn(model)(x), expected) < EXACT


# The host's initialisation


def test_own_init_cfg_applies():
    block = DBB(
        4,
        8,
        3,
        init_cfg=[
            dict(type='Constant', layer='Conv2d', val=0.5),
            dict(type='Constant', layer='BatchNorm2d', val=0.25),
        ],
    )
    block.init_weights()
    weights = block.branches['kxk'].conv.weight
    assert torch.equal(weights, torch.full_like(weights, 0.5))
    gamma = block.branches['1x1'].norm.weight
    assert torch.equal(gamma, torch.full_like(gamma, 0.25))


def test_apply_reaches_what_is_inside():
    block = DBB(4, 8, 3)
    seen = []
    block.apply(lambda m: seen.append(m))
    assert set(seen) == set(block.modules())
