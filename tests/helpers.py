"""What the tests share: random norms, measures, random geometries."""

import contextlib
import logging
import re
import runpy
import sys
from pathlib import Path

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks import ReparamConv2d, fast
from mmdbb.geometry import PADDING_MODES
from mmdbb.scale_norm import ScaleNorm

EXACT = 1e-10  # float64, relative to the largest magnitude
SINGLE = 2e-5  # float32


@torch.no_grad()
def randomize(model, seed=0):
    """Random norms, negative gammas too, and kernels moved off their start.

    At BN's defaults the border's value is zero and half of the possible
    mistakes cannot be seen.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        values = torch.rand(
            tensor.shape, generator=generator, dtype=torch.float64
        )
        tensor.copy_(low + (high - low) * values)

    norms = set()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            norms.update(id(p) for p in module.parameters())
            if module.running_mean is not None:
                if not isinstance(module, ScaleNorm):
                    uniform(module.running_mean, -1, 1)
                uniform(module.running_var, 0.3, 2)
            if module.affine:
                uniform(module.weight, -1.5, 1.5)
            if module.bias is not None:
                uniform(module.bias, -1, 1)
    for block in model.modules():
        if isinstance(block, ReparamConv2d):
            for parameter in block.parameters():
                if id(parameter) not in norms:
                    values = torch.randn(
                        parameter.shape,
                        generator=generator,
                        dtype=torch.float64,
                    )
                    parameter.add_((0.2 * values).to(parameter.dtype))
    return model


@contextlib.contextmanager
def every_batch_is_large():
    """Within the context, blocks take the fast way on tiny images too."""
    before = fast._is_small
    fast._is_small = lambda spec, pixels: False
    try:
        yield
    finally:
        fast._is_small = before


def distance(found, expected):
    """Largest difference over the largest magnitude expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach().double(), expected.detach().double()
    scale = expected.abs().max().clamp_min(1e-300)
    return ((found - expected).abs().max() / scale).item()


def state(net, *others):
    """Gradients and buffers, for comparing."""
    found = dict(net.named_buffers())
    found.update({f'grad {n}': p.grad for n, p in net.named_parameters()})
    found.update({f'other {i}': t for i, t in enumerate(others)})
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    # A gradient that is zero but for rounding is measured by its neighbours.
    grads = [v for k, v in expected.items() if 'grad' in k and v is not None]
    family = max((g.abs().max() for g in grads), default=0)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        elif 'grad' in name:
            error = (found[name] - value).abs().max()
            assert error <= EXACT * family, name
        else:
            assert distance(found[name], value) < EXACT, name


def plain_conv(spec, kernel, bias):
    """An ``nn.Conv2d`` of this geometry with these weights."""
    conv = nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.groups,
        padding_mode=spec.padding_mode,
    ).to(kernel.dtype)
    conv.load_state_dict(dict(weight=kernel.detach(), bias=bias.detach()))
    return conv


def tensors(outputs):
    """Flatten a tensor or nested tuples, lists and dicts of tensors."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [tensor for part in outputs for tensor in tensors(part)]


def image(*shape, seed=0, dtype=torch.float64):
    """Random images whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype)


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, ReparamConv2d)]


KERNELS = (1, 2, 3, 4, 5, 7, (1, 3), (3, 1), (2, 3))


@st.composite
def geometries(draw, kernels=KERNELS, same_channels=False):
    """A convolution's arguments and the shape of an input it takes."""
    kernel = draw(st.sampled_from(kernels))
    high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    dilation = draw(st.sampled_from([1, 2, (1, 2)]))
    down, right = (
        dilation if isinstance(dilation, tuple) else (dilation, dilation)
    )
    stride = draw(st.sampled_from([1, 1, 2, (2, 1), 3]))
    padding = draw(
        st.sampled_from(['same', 'valid', 'half', 'more', 'less', 'zero'])
    )
    if padding == 'same':
        stride = 1
    reach = (down * (high - 1), right * (wide - 1))
    if padding in ('half', 'more', 'less'):
        extra = dict(half=0, more=draw(st.integers(1, 2)), less=-1)[padding]
        padding = tuple(max(r // 2 + extra, 0) for r in reach)
    elif padding == 'zero':
        padding = 0
    groups, inside, outside = draw(
        st.sampled_from(
            [(1, 3, 3), (2, 4, 4), (4, 4, 4)]
            if same_channels
            else [(1, 3, 5), (1, 3, 3), (2, 4, 6), (4, 4, 4), (3, 3, 6)]
        )
    )
    if same_channels:
        stride = 1
    mode = draw(st.sampled_from(PADDING_MODES))
    arguments = dict(
        in_channels=inside,
        out_channels=outside,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
    )
    # Room for one output, and for reflecting and wrapping the border.
    size = [reach[i] + 2 + draw(st.integers(0, 3)) + i for i in range(2)]
    if isinstance(padding, tuple):
        size = [max(s, p + 1) for s, p in zip(size, padding)]
    return arguments, (2, inside, *size)


def pad_with_values(x, values, pads):
    """Pad images with one value a channel: the border of a BN's output."""
    top, bottom, left, right = pads
    values = values.reshape(1, -1, 1, 1)
    return F.pad(x - values, (left, right, top, bottom)) + values


def sums_saturate():
    """Whether ONNX Runtime's eight-bit sums saturate here: x86 without VNNI.

    Users get `--reduce-range` for it; integers then are no fake quantization.
    """
    info = Path('/proc/cpuinfo')
    flags = info.read_text() if info.is_file() else ''
    return 'sse4' in flags and not re.search('avx(512)?_vnni', flags)


@contextlib.contextmanager
def process_kept():
    """Undo what a tool sets for its own process, where tests share one."""
    disabled = logging.root.manager.disable
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        logging.disable(disabled)
        torch.set_num_threads(threads)


def run_tool(name, *arguments):
    """Run a tool in this process; its exit code."""
    tools = Path(__file__).resolve().parents[1] / 'tools'
    argv, sys.argv = sys.argv, [f'{name}.py', *map(str, arguments)]
    try:
        with process_kept():
            runpy.run_path(str(tools / f'{name}.py'), run_name='__main__')
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
    return 0


def deploy(cfg, checkpoint, out, overwrite=False, **options):
    """What tools/reparam.py calls, its options in a row."""
    from mmdbb.mm.deploy.checkpoint import deploy_checkpoint
    from mmdbb.mm.deploy.merge import MergeOptions
    from mmdbb.mm.outputs import Proof, Source

    ema, unsafe = options.pop('ema', None), options.pop('unsafe', False)
    return deploy_checkpoint(
        Source(cfg, str(checkpoint), ema, unsafe),
        str(out),
        _taken(MergeOptions, options),
        _taken(Proof, options),
        overwrite,
        **options,
    )


def export(model, out, format='onnx', image_size=(224, 224), **options):
    """`export_network`, its proof in a row."""
    from mmdbb.mm.export.network import export_network
    from mmdbb.mm.outputs import Proof

    proof = _taken(Proof, dict(options, image_size=image_size))
    options = {k: v for k, v in options.items() if k not in Proof._fields}
    return export_network(model, out, format, proof=proof, **options)


def _taken(kind, options):
    return kind(**{n: options.pop(n) for n in kind._fields if n in options})
