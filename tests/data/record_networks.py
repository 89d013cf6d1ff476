"""Make the files of the newer papers' networks in ``official``.

    git clone https://github.com/AILab-CVC/UniRepLKNet unireplknet
    git clone https://github.com/DingXiaoH/RepLKNet-pytorch replknet
    git clone https://github.com/apple/ml-mobileone mobileone
    python tests/data/record_networks.py --checkouts . --out official

It needs PyTorch, NumPy and timm, and nothing of mmdbb. For each repository it
builds a tiny network by the repository's own code, draws its parameters and
running statistics, and writes in the code's own form

- ``NAME_train.pth.xz``, and after its own merging ``NAME_deploy.pth.xz``
- ``NAME_io.npz``: images, and what the code computes from them in float32

and into ``newer_keys.json.xz`` names and shapes of all entries of networks of
full size, before and after merging.
"""

import argparse
import contextlib
import io
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

#: By repository: its module, the arguments of a tiny network and full sizes.
NETWORKS = dict(
    unireplknet=(
        dict(
            depths=(1, 1, 2, 1),
            dims=(4, 4, 6, 8),
            num_classes=5,
            kernel_sizes=((3,), (7,), (13, 5), (7,)),
            attempt_use_lk_impl=False,
        ),
        [f'unireplknet_{name}' for name in 'nts'],
        'reparameterize_unireplknet',
    ),
    replknet=(
        dict(
            large_kernel_sizes=[7, 7, 9, 5],
            layers=[1, 1, 2, 1],
            channels=[2, 2, 4, 4],
            drop_path_rate=0.0,
            small_kernel=5,
            num_classes=4,
            use_sync_bn=False,
        ),
        ['create_RepLKNet31B'],
        'structural_reparam',
    ),
    mobileone=(
        dict(
            num_blocks_per_stage=[1, 2, 2, 1],
            num_classes=4,
            width_multipliers=[0.0625, 0.0625, 0.0625, 0.0625],
            num_conv_branches=2,
        ),
        ['s0', 's4'],
        'reparameterize',
    ),
)


def imported(checkouts, name):
    sys.path.insert(0, str(checkouts / name))
    with contextlib.redirect_stdout(io.StringIO()):
        return __import__(name)


def tiny(module, name, arguments):
    classes = dict(
        unireplknet='UniRepLKNet', replknet='RepLKNet', mobileone='MobileOne'
    )
    return getattr(module, classes[name])(**arguments)


def full(module, name, size):
    if name == 'mobileone':
        return module.mobileone(variant=size)
    more = dict(attempt_use_lk_impl=False) if name == 'unireplknet' else {}
    return getattr(module, size)(**more)


@torch.no_grad()
def draw_(network, generator):
    """Random norms, and weights under which images stay of one size."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.3, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -1, 1),
            ):
                values = torch.rand(value.shape, generator=generator)
                value.copy_(low + (high - low) * values)
    norms = {
        id(p)
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
        for p in module.parameters()
    }
    for parameter in network.parameters():
        if id(parameter) not in norms:
            values = torch.randn(parameter.shape, generator=generator)
            size = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(values / size**0.5)


def merge_(network, method):
    with contextlib.redirect_stdout(io.StringIO()):
        for module in list(network.modules()):
            if hasattr(module, method):
                getattr(module, method)()


def packed(state):
    file = io.BytesIO()
    torch.save(state, file)
    return lzma.compress(file.getvalue(), preset=9)


def shapes(network):
    return {k: list(v.shape) for k, v in network.state_dict().items()}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--checkouts', type=Path, required=True)
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    keys = {}
    for name, (arguments, sizes, method) in NETWORKS.items():
        module = imported(args.checkouts, name)
        generator = torch.Generator().manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            network = tiny(module, name, arguments)
        draw_(network, generator)
        network.eval()
        x = torch.randn(1, 3, 64, 48, generator=generator)
        x = (x * 8).round() / 8  # packs well
        y = network(x)
        np.savez_compressed(
            args.out / f'{name}_io.npz', input=x.numpy(), output=y.numpy()
        )
        state = network.state_dict()
        if name == 'unireplknet':  # as its code saves it
            state = dict(model=state, epoch=1)
        (args.out / f'{name}_train.pth.xz').write_bytes(packed(state))
        merge_(network, method)
        error = (network(x) - y).abs().max() / y.abs().max()
        print(f'{name}: merging changes {error:.1e} of the output')
        file = args.out / f'{name}_deploy.pth.xz'
        file.write_bytes(packed(network.state_dict()))
        for size in sizes:
            with contextlib.redirect_stdout(io.StringIO()):
                network = full(module, name, size)
            keys[f'{name}_{size}'] = dict(train=shapes(network))
            merge_(network, method)
            keys[f'{name}_{size}']['deploy'] = shapes(network)
    (args.out / 'newer_keys.json.xz').write_bytes(
        lzma.compress(json.dumps(keys).encode(), preset=9)
    )


if __name__ == '__main__':
    main()
