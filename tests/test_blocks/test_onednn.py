"""What oneDNN computes wrongly is kept from it.

In a strided 1x1 convolution over few channels, in channels_last, it writes
outside its memory: the process dies, hangs or is wrong. So blocks train in a
process of their own here, and their gradients are compared with those of
float64 in the usual layout, which oneDNN does not compute.
"""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from mmdbb.blocks import RepVGGConv
from mmdbb.geometry import ConvSpec, crop_unread

LAST = torch.channels_last


def train(block, x, layouts):
    """Gradients of a block's parameters, in these layouts of it and images."""
    block = block.to(memory_format=layouts[0])
    y = block(x.to(memory_format=layouts[1]))
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(grads.to(y.dtype))
    # What another tensor's memory would have been overwritten in.
    for size in (8, 64, 100, 1000):
        assert torch.rand(size).isfinite().all()
    return [p.grad for p in block.parameters() if p.grad is not None]


def run_everything():
    """Train each block as the first layer of a network on pictures."""
    from helpers import SINGLE, image
    from registered import blocks

    torch.set_num_threads(2)
    for kind, size, side in itertools.product(blocks(), (1, 3), (28, 12)):
        (kind,) = kind.values
        torch.manual_seed(0)
        block = kind(3, 8, size, 2, size // 2)
        x = image(20, 3, side, side)
        wanted = train(copy.deepcopy(block).double(), x, [None, None])
        for layouts in ((LAST, LAST), (LAST, torch.contiguous_format)):
            for compiled in (False, True):
                print(kind.__name__, size, side, layouts, compiled, flush=True)
                twin = copy.deepcopy(block)
                if compiled:
                    if size == 1 or side != 28 or layouts[1] is not LAST:
                        continue
                    twin.compile(backend='aot_eager')
                found = train(twin, x.float(), layouts)
                # Some are zero in truth, as of a bias before a norm.
                scale = max(float(right.abs().max()) for right in wanted)
                for one, right in zip(found, wanted):
                    error = float((one - right).abs().max())
                    assert error < 50 * SINGLE * scale, (error, scale)


def test_blocks_train_on_pictures_in_channels_last():
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', __file__],
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = run.stdout.strip().rsplit('\n', 1)[-1]
    assert run.returncode == 0, f'{last}: {run.returncode} {run.stderr}'


@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('stride', [1, 2, 3, (1, 2), (2, 3)])
@pytest.mark.parametrize('size', [1, 3, (1, 3)])
@pytest.mark.parametrize('padding', [0, 1])
def test_only_what_no_tap_reads_is_cropped(size, stride, padding, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, size, stride, padding, groups=groups).double()
    spec = ConvSpec(3, 6, size, stride, padding, groups=groups)
    cropped = 0
    for height, width in itertools.product(range(3, 9), repeat=2):
        x = torch.rand(2, 3, height, width, dtype=torch.float64)
        x = x.to(memory_format=LAST)
        found = crop_unread(x, conv, conv.weight)
        assert found.shape == crop_unread(x, spec).shape
        assert torch.equal(conv(found), conv(x))
        # oneDNN's own condition for the method that fails.
        out = conv(x).shape[2:]
        by_stride = [o * s for o, s in zip(out, conv.stride)]
        fails = conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        fails = fails and groups == 1 and padding == 0
        if fails and by_stride == [height, width]:
            out = conv(found).shape[2:]
            by_stride = [o * s for o, s in zip(out, conv.stride)]
            assert by_stride != [*found.shape[2:]]
            cropped += 1
        elif found.shape != x.shape:
            assert fails
    assert (cropped > 0) == (
        (size, padding, groups) == (1, 0, 1) and stride != 1
    )


def test_nothing_is_cropped_where_onednn_is_right():
    conv = nn.Conv2d(3, 4, 1, 2)
    x = torch.rand(1, 3, 8, 8)
    assert crop_unread(x, conv, conv.weight) is x
    x_last = x.to(memory_format=LAST)
    assert crop_unread(x_last, conv, conv.weight) is not x_last
    last = copy.deepcopy(conv).to(memory_format=LAST)
    assert crop_unread(x, last, last.weight) is not x
    with torch.no_grad():
        assert crop_unread(x, last, last.weight) is x
    meta = torch.rand(1, 3, 8, 8, device='meta').to(memory_format=LAST)
    assert crop_unread(meta, last, last.weight) is meta
    wide = nn.Conv2d(16, 4, 1, 2)
    images = torch.rand(1, 16, 8, 8).to(memory_format=LAST)
    assert crop_unread(images, wide, wide.weight) is images
    grey = torch.rand(1, 1, 8, 8).to(memory_format=LAST)
    one = nn.Conv2d(1, 4, 1, 2)
    assert crop_unread(grey, one, one.weight) is not grey


def test_exports_keep_any_image_size():
    block = RepVGGConv(3, 4, 3, 2, 1).to(memory_format=LAST)
    sizes = {2: torch.export.Dim('h', min=4), 3: torch.export.Dim('w', min=4)}
    exported = torch.export.export(
        block,
        (torch.rand(2, 3, 8, 10).to(memory_format=LAST),),
        dynamic_shapes=(sizes,),
        strict=True,
    )
    x = torch.rand(2, 3, 9, 12).to(memory_format=LAST)
    torch.testing.assert_close(exported.module()(x), block(x))


def test_a_parametrized_weight_is_not_computed_twice():
    from mmdbb.branches import build_branch

    branch = build_branch('1x1', ConvSpec(3, 4, 3, 2, 1))
    weight_norm(branch.conv)
    calls = []
    branch.conv.parametrizations.weight.register_forward_hook(
        lambda *args: calls.append(args)
    )
    branch(torch.rand(2, 3, 8, 8).to(memory_format=LAST))
    assert len(calls) == 1


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[1]))
    run_everything()
