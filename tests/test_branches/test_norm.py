"""The norms inside branches: which are allowed, and how they are run."""

import pytest
import torch
from helpers import EXACT, distance, image, pad_with_values, randomize
from mmengine.registry import MODELS
from torch import nn

from mmdbb.branches.norm import (
    build_branch_norm,
    norm_scale_shift,
    norm_then_pad,
    run_norm,
)
from mmdbb.geometry import ConvSpec


class PlainSubclass(nn.BatchNorm2d):
    """Keeps its base's forward()."""


class OwnForward(nn.BatchNorm2d):
    """Computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture(autouse=True, scope='module')
def _registered():
    for norm in (PlainSubclass, OwnForward):
        norm._abbr_ = 'bn'
        MODELS.register_module(module=norm)
    yield
    for norm in (PlainSubclass, OwnForward):
        del MODELS._module_dict[norm.__name__]


def test_default_is_batch_norm():
    assert type(build_branch_norm(None, 3)) is nn.BatchNorm2d


@pytest.mark.parametrize(
    'cfg',
    [
        dict(type='BN', eps=0.1, momentum=0.3),
        dict(type='SyncBN'),
        dict(type='BN', affine=False),
        dict(type='PlainSubclass'),
    ],
)
def test_allowed(cfg):
    norm = build_branch_norm(cfg, 3)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.eps == cfg.get('eps', 1e-5)
    assert norm.affine == cfg.get('affine', True)


@pytest.mark.parametrize(
    'cfg, reason',
    [
        (dict(type='GN', num_groups=3), 'it is not a batch norm'),
        (dict(type='IN'), 'it is not a batch norm'),
        (
            dict(type='BN', track_running_stats=False),
            'depends on the batch.*track_running_stats=False',
        ),
        (dict(type='OwnForward'), r'OwnForward overrides forward\(\)'),
    ],
)
def test_refused_with_the_reason(cfg, reason):
    message = f"cannot be merged .*{reason}.*Allowed: 'BN', 'SyncBN'"
    with pytest.raises(ValueError, match=message):
        build_branch_norm(cfg, 3)


def test_requires_grad_of_the_config():
    norm = build_branch_norm(dict(type='BN', requires_grad=False), 3)
    assert not norm.weight.requires_grad


@pytest.mark.parametrize('affine', [True, False])
def test_norm_scale_shift_is_eval_mode(affine):
    norm = build_branch_norm(dict(type='BN', affine=affine, eps=0.1), 3)
    norm = randomize(norm.double()).eval()
    x = image(2, 3, 4, 5)
    scale, shift = norm_scale_shift(norm)
    found = x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
    assert distance(found, norm(x)) < EXACT


@pytest.mark.parametrize('training', [True, False])
def test_border_is_what_running_statistics_make_of_zero(training):
    norm = randomize(nn.BatchNorm2d(3).double()).train(training)
    twin = randomize(nn.BatchNorm2d(3).double()).train(training)
    spec = ConvSpec(3, 3, (3, 5), padding=(1, 2))
    x = image(2, 3, 4, 5).requires_grad_()
    found = norm_then_pad(norm, x, spec)
    inside = twin(x)
    # After this step's update.
    border = norm_scale_shift(twin).shift.detach()
    expected = pad_with_values(inside, border, spec.pads)
    assert distance(found, expected) < EXACT
    # The border carries no gradient.
    grads = torch.autograd.grad(
        found[..., 0, :].sum(), [x, norm.bias], allow_unused=True
    )
    assert all(g is None or g.abs().max() == 0 for g in grads)


def test_run_norm_updates_once_forward():
    norm = nn.BatchNorm2d(3).double()
    x = image(2, 3, 4, 5)
    for _ in range(2):
        run_norm(norm, x)
    assert norm.num_batches_tracked == 2


def test_run_norm_does_not_update_in_the_backward_pass():
    norm = nn.BatchNorm2d(3).double()
    x = image(2, 3, 4, 5)
    seen = []

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(run_norm(norm, x))
            return grad

    first = run_norm(norm, x)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    pointer = norm.running_mean.data_ptr()
    y = torch.ones(1, requires_grad=True)
    Recompute.apply(y).sum().backward()
    assert torch.equal(seen[0], first)
    assert norm.running_mean.data_ptr() == pointer
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
