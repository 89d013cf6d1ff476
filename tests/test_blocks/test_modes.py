"""Every registered block in every mode of training: the literal sum's numbers.

The reference runs ``forward_branches`` in the same mode, in float64. What a
block computes there is compared with the papers' code elsewhere.
"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from helpers import assert_same, image, randomize, state
from registered import distinct_blocks
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils.checkpoint import checkpoint

BLOCKS = distinct_blocks()
#: By name: the block's arguments, and the sides of its images.
GEOMETRIES = dict(
    collapsed=(dict(in_channels=4, out_channels=4), (12, 13)),
    small=(dict(in_channels=6, out_channels=8), (4, 5)),
    depthwise=(dict(in_channels=4, out_channels=4, groups=4), (9, 10)),
    tiny=(dict(in_channels=5, out_channels=5, groups=5), (2, 3)),
    widening=(dict(in_channels=2, out_channels=16), (9, 8)),
)


class Literal(nn.Module):
    """A block whose forward is the literal sum."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.forward_branches(x)


class Default(Literal):
    """The same module with the block's own forward."""

    def forward(self, x):
        return self.block(x)


def make(name, geometry):
    arguments, _ = GEOMETRIES[geometry]
    block = BLOCKS[name](kernel_size=3, padding=1, **arguments)
    block = randomize(block.double())
    return Default(block), Literal(copy.deepcopy(block))


def images(geometry, seed=0, batch=3, scale=1.0):
    arguments, (height, width) = GEOMETRIES[geometry]
    shape = (batch, arguments['in_channels'], height, width)
    return scale * image(*shape, seed=seed)


def loss_of(y, seed=7):
    return (y.square() * image(*y.shape, seed=seed, dtype=y.dtype)).sum()


def one_pass(net, geometry):
    x = images(geometry).requires_grad_()
    y = net(x)
    loss_of(y).backward()
    return state(net, y, x.grad)


def two_views(net, geometry):
    """Two batches before one backward pass: SimSiam, BYOL, a GAN's step."""
    views = [images(geometry, s, scale=s + 1).requires_grad_() for s in (0, 1)]
    outputs = [net(x) for x in views]
    sum(loss_of(y) for y in outputs).backward()
    return state(net, *outputs, *(x.grad for x in views))


def one_view_twice(net, geometry):
    x = images(geometry).requires_grad_()
    (loss_of(net(x)) - 2 * loss_of(net(x), seed=3)).backward()
    return state(net, x.grad)


def three_levels(net, geometry):
    """A head that detectors share over the levels of a pyramid."""
    x = images(geometry).repeat(1, 1, 2, 2)
    levels = [x, 2 * x[..., ::2, ::2], 3 * x[..., ::3, ::3]]
    sum(loss_of(net(level)) for level in levels).backward()
    return state(net)


def accumulated(net, geometry):
    for seed in (0, 1):
        loss_of(net(images(geometry, seed, scale=seed + 1))).backward()
    return state(net)


def backward_in_order(net, geometry):
    """The first forward pass's backward first, not last."""
    losses = [loss_of(net(images(geometry, s, scale=s + 1))) for s in (0, 1)]
    for loss in losses:
        loss.backward()
    return state(net)


def checkpointed(reentrant):
    def run(net, geometry):
        x = images(geometry).requires_grad_()
        y = checkpoint(net, x, use_reentrant=reentrant)
        loss_of(y).backward()
        return state(net, y, x.grad)

    return run


def checkpointed_views(reentrant):
    def run(net, geometry):
        views = [
            images(geometry, s, scale=s + 1).requires_grad_() for s in (0, 1)
        ]
        views.append(views[0])  # one of them twice
        outputs = [checkpoint(net, x, use_reentrant=reentrant) for x in views]
        sum(loss_of(y, seed) for seed, y in enumerate(outputs)).backward()
        return state(net, *outputs, *(x.grad for x in views))

    return run


def first_of_two(reentrant):
    """Two checkpointed passes of one batch, of which one has a gradient."""

    def run(net, geometry):
        x = images(geometry).requires_grad_()
        y, _ = (checkpoint(net, x, use_reentrant=reentrant) for _ in range(2))
        loss_of(y).backward()
        return state(net, y, x.grad)

    return run


def twice_in_a_segment(reentrant):
    def run(net, geometry):
        x = images(geometry).requires_grad_()

        def segment(x):
            return net(x) - 2 * net(x).square()

        y = checkpoint(segment, x, use_reentrant=reentrant)
        loss_of(y).backward()
        return state(net, y, x.grad)

    return run


def nested_checkpoints(reentrant):
    def run(net, geometry):
        x = images(geometry).requires_grad_()

        def inner(x):
            return checkpoint(net, x, use_reentrant=reentrant)

        def segment(x):
            return inner(x) - 2 * inner(x).square()

        y = checkpoint(segment, x, use_reentrant=reentrant)
        loss_of(y).backward()
        return state(net, y, x.grad)

    return run


def without_statistics(net, geometry):
    """Norms that keep theirs for a while, as for virtual adversaries."""
    norms = [m for m in net.modules() if hasattr(m, 'track_running_stats')]
    for norm in norms:
        norm.track_running_stats = False
    try:
        return one_pass(net, geometry)
    finally:
        for norm in norms:
            norm.track_running_stats = True


def hessian_vector(net, geometry):
    x, v = images(geometry), images(geometry, 5)
    found = torch.autograd.functional.hvp(lambda x: loss_of(net(x)), x, v)
    return dict(value=found[0], product=found[1], **state(net))


def vector_hessian(net, geometry):
    x, v = images(geometry), images(geometry, 5)
    found = torch.autograd.functional.vhp(lambda x: loss_of(net(x)), x, v)
    return dict(value=found[0], product=found[1])


def gradient_penalty(net, geometry):
    x = images(geometry).requires_grad_()
    grads = torch.autograd.grad(
        loss_of(net(x)), [x, *net.parameters()], create_graph=True
    )
    sum(g.square().sum() for g in grads).backward()
    return state(net, *grads)


def inner_step(net, geometry):
    """MAML: the outer loss sees the parameters after an inner step."""
    parameters = dict(net.named_parameters())
    loss = loss_of(functional_call(net, parameters, (images(geometry),)))
    grads = torch.autograd.grad(loss, parameters.values(), create_graph=True)
    moved = {n: p - 1e-4 * g for (n, p), g in zip(parameters.items(), grads)}
    y = functional_call(net, moved, (images(geometry, 1),))
    loss_of(y).backward()
    return state(net, y)


def forward_mode(net, geometry):
    with fwAD.dual_level():
        x = fwAD.make_dual(images(geometry), images(geometry, 5))
        value, tangent = fwAD.unpack_dual(net(x))
        return dict(value=value, tangent=tangent)


def func_grad(net, geometry):
    """torch.func asks for buffers as arguments, of a conv and BN too."""
    parameters, buffers = dict(net.named_parameters()), own_buffers(net)

    def loss(parameters, x, buffers):
        return loss_of(functional_call(net, (parameters, buffers), (x,)))

    grads, grad_x = torch.func.grad(loss, (0, 1))(
        parameters, images(geometry), buffers
    )
    grads = {f'grad {name}': grad for name, grad in grads.items()}
    return dict(grads, input=grad_x)


def func_jvp(net, geometry):
    def run(x):
        return functional_call(net, own_buffers(net), (x,))

    found = torch.func.jvp(run, (images(geometry),), (images(geometry, 5),))
    return dict(value=found[0], tangent=found[1])


def own_buffers(net):
    return {name: b.clone() for name, b in net.named_buffers()}


def ensemble(net, geometry):
    """Two models at once, as torch.func's tutorial has it."""
    other = randomize(copy.deepcopy(net), seed=9)
    parameters, buffers = stack_module_state([net, other])

    def run(parameters, buffers, x):
        return functional_call(net, (parameters, buffers), (x,))

    x = torch.stack([images(geometry), images(geometry, 1)])
    return dict(y=torch.func.vmap(run)(parameters, buffers, x))


def each_sample(net, geometry):
    """A gradient for each image, as differential privacy needs."""
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return functional_call(net, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    return each(parameters, images(geometry))


def within_a_hook(net, geometry):
    """A forward pass that a backward pass starts is one of its own."""
    x = images(geometry).requires_grad_()
    y = net(x)
    others = []
    x.register_hook(lambda grad: others.append(net(images(geometry, 1))))
    loss_of(y).backward()
    return state(net, x.grad, *others)


def replica(net, geometry):
    """What nn.DataParallel makes of a network on each device."""
    copies = {}
    for module in net.modules():
        copied = module._replicate_for_data_parallel()
        copied._former_parameters = {}
        copies[module] = copied
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, parameter * 1)
                copied._former_parameters[name] = getattr(copied, name)
    x = images(geometry).requires_grad_()
    y = copies[net](x)
    loss_of(y).backward()
    return state(net, y, x.grad)


def partly_frozen(net, geometry):
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    return one_pass(net, geometry)


TRAINING = dict(
    one_pass=one_pass,
    two_views=two_views,
    one_view_twice=one_view_twice,
    three_levels=three_levels,
    accumulated=accumulated,
    backward_in_order=backward_in_order,
    checkpointed=checkpointed(False),
    checkpointed_reentrant=checkpointed(True),
    checkpointed_views=checkpointed_views(False),
    checkpointed_views_reentrant=checkpointed_views(True),
    first_of_two=first_of_two(False),
    first_of_two_reentrant=first_of_two(True),
    twice_in_a_segment=twice_in_a_segment(False),
    twice_in_a_segment_reentrant=twice_in_a_segment(True),
    nested_checkpoints=nested_checkpoints(False),
    nested_checkpoints_reentrant=nested_checkpoints(True),
    without_statistics=without_statistics,
    hessian_vector=hessian_vector,
    vector_hessian=vector_hessian,
    gradient_penalty=gradient_penalty,
    inner_step=inner_step,
    forward_mode=forward_mode,
    func_grad=func_grad,
    func_jvp=func_jvp,
    ensemble=ensemble,
    within_a_hook=within_a_hook,
    replica=replica,
    partly_frozen=partly_frozen,
)
EVAL = dict(
    one_pass=one_pass,
    two_views=two_views,
    hessian_vector=hessian_vector,
    gradient_penalty=gradient_penalty,
    forward_mode=forward_mode,
    func_grad=func_grad,
    func_jvp=func_jvp,
    ensemble=ensemble,
    each_sample=each_sample,
    replica=replica,
    partly_frozen=partly_frozen,
)


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize(
    'mode',
    [*(f'training {m}' for m in TRAINING), *(f'eval {m}' for m in EVAL)],
)
def test_mode(name, geometry, mode):
    kind, mode = mode.split()
    run = (TRAINING if kind == 'training' else EVAL)[mode]
    fast, literal = make(name, geometry)
    for net in (fast, literal):
        net.train(kind == 'training')
    assert_same(run(fast, geometry), run(literal, geometry))
