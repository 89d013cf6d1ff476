"""Record and check the reference vectors, by running the papers' own code.

    git clone https://github.com/DingXiaoH/DiverseBranchBlock dbb
    git clone https://github.com/JUGGHM/OREPA_CVPR2022 orepa
    git clone https://github.com/AILab-CVC/UniRepLKNet unireplknet
    git clone https://github.com/DingXiaoH/RepLKNet-pytorch replknet
    git clone https://github.com/apple/ml-mobileone mobileone
    python tests/data/record.py --checkouts . --check
    python tests/data/record.py --checkouts . --out FOLDER

It needs PyTorch, NumPy and timm, and nothing of mmdbb. ``--check`` computes
again what the files beside it hold, from the states, inputs and gradients of
outputs in them, and exits with 1 where a number differs. ``--out`` writes
files with the same cases and fields, of random numbers of its own.

What each file is, and where it comes from (DiverseBranchBlock at 8d2b16b,
OREPA_CVPR2022 at 3ed037b, the newest of the others in 2026, in float64):

- ``dbb``: DBB's ``DiverseBranchBlock`` of ``diversebranchblock.py``
- ``acb``: its ``ACBlock`` of ``acb.py``
- ``orepa``: OREPA's ``OREPA``, ``OREPA_1x1``, ``OREPA_LargeConv`` and
  ``OREPA_LargeConvBase`` of ``blocks.py``
- ``repvgg``: its ``RepVGGBlock`` and ``RepVGGBlock_OREPA`` of
  ``blocks_repvgg.py``
- ``newer``: UniRepLKNet's ``DilatedReparamBlock`` of ``unireplknet.py``,
  RepLKNet's ``ReparamLargeKernelConv`` of ``replknet.py``, MobileOne's
  ``MobileOneBlock`` of ``mobileone.py``
- ``two_forwards``: one 3x3 block of most of these classes, two batches before
  one backward pass; written by ``--out``

The first four are the project's reference vectors (``shared/reference``): all
cases of its ``dbb`` and ``acb``, 7 of 10 of its ``orepa`` and 4 of 5 of its
``repvgg``; the tests' data stay below 4 MB. ``--check FOLDER`` holds the whole
reference to the papers' code as well, with ``--files`` naming these four.
(The reference has a ``newer`` with the same cases. Its running statistics
before the step are those after it, so ours was written by ``--out``.)

This script makes no other file here. ``official/`` has tiny networks in the
papers' own checkpoint format with an input and an output each, and the names
and shapes of the full-size ones (``keys.json.xz``): copies of the reference's
``checkpoints`` and ``official_keys``; ``record_networks.py`` makes those of
UniRepLKNet, RepLKNet and MobileOne. ``papers.json.xz`` has starts and
training steps that the papers' code computed; ``tests/papers.py`` has what the
code was given.

A ``.json`` has each case's class, arguments and shape of the input, or a list
of shapes: that many forward passes before one backward pass. The ``.npz``
beside it has arrays ``CASE/FIELD``: ``state/*`` before the step, ``input``,
``train/output``, ``train/grad_output``, ``train/grad_input``,
``train/grad/*`` of every parameter, ``train/buffers/*`` after the step, then
in eval mode ``eval/output``, ``eval/kernel`` and ``eval/bias``. With several
passes there are ``input/0``, ``input/1`` and so on, and nothing in eval mode.
"""

import argparse
import contextlib
import copy
import importlib
import io
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
FILES = ('dbb', 'acb', 'orepa', 'repvgg', 'newer', 'two_forwards')
TOLERANCE = 1e-12  # of the largest magnitude
#: By class, the checkout and the module that it stands in.
SOURCES = dict(
    DiverseBranchBlock=('dbb', 'diversebranchblock'),
    ACBlock=('dbb', 'acb'),
    OREPA=('orepa', 'blocks'),
    OREPA_1x1=('orepa', 'blocks'),
    OREPA_LargeConv=('orepa', 'blocks'),
    OREPA_LargeConvBase=('orepa', 'blocks'),
    RepVGGBlock=('orepa', 'blocks_repvgg'),
    RepVGGBlock_OREPA=('orepa', 'blocks_repvgg'),
    DilatedReparamBlock=('unireplknet', 'unireplknet'),
    ReparamLargeKernelConv=('replknet', 'replknet'),
    MobileOneBlock=('mobileone', 'mobileone'),
)
CHECKOUTS = sorted({checkout for checkout, _ in SOURCES.values()})
#: Arguments that their code wants, and that are not part of a case.
MORE = dict(DilatedReparamBlock=dict(deploy=False, attempt_use_lk_impl=False))


def two_forwards(cls, inside, outside, groups=1):
    """Two batches of different sizes through one 3x3 block."""
    kwargs = dict(
        in_channels=inside,
        out_channels=outside,
        kernel_size=3,
        stride=1,
        padding=1,
        groups=groups,
    )
    shapes = [[2, inside, 6, 7], [3, inside, 4, 3]]
    return dict(cls=cls, kwargs=kwargs, input=shapes)


#: Images of both kinds: with and without enough pixels to collapse a branch.
TWO_FORWARDS = dict(
    dbb_in3_out3=two_forwards('DiverseBranchBlock', 3, 3),
    dbb_in2_out4=two_forwards('DiverseBranchBlock', 2, 4),
    dbb_depthwise=two_forwards('DiverseBranchBlock', 3, 3, groups=3),
    acb=two_forwards('ACBlock', 2, 3),
    repvgg_identity=two_forwards('RepVGGBlock', 3, 3),
    repvgg_orepa=two_forwards('RepVGGBlock_OREPA', 2, 2),
    orepa=two_forwards('OREPA', 2, 3),
)


class Papers:
    """The papers' classes, whose modules have the same names twice."""

    def __init__(self, folder):
        self.folder = folder
        self.classes = {}

    def _import(self, name):
        checkout, module = SOURCES[name]
        with imported_from(self.folder / checkout):
            self.classes[name] = getattr(importlib.import_module(module), name)

    def build(self, meta):
        with contextlib.redirect_stdout(io.StringIO()):
            if meta['cls'] not in self.classes:
                self._import(meta['cls'])
            kwargs = {**MORE.get(meta['cls'], {}), **meta['kwargs']}
            return self.classes[meta['cls']](**kwargs).double()


@contextlib.contextmanager
def imported_from(folder):
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], '__file__', None) or '/'
            if Path(file).resolve().is_relative_to(Path(folder).resolve()):
                del sys.modules[name]


# ------------------------------------------------------------------- files


def read(folder, name):
    """The cases of a file and their arrays, or None for the latter."""
    metas = json.loads((folder / f'{name}.json').read_text())
    packed = folder / f'{name}.npz.xz'
    if packed.exists():
        stored = io.BytesIO(lzma.decompress(packed.read_bytes()))
    else:
        stored = folder / f'{name}.npz'
    arrays = {case: {} for case in metas}
    with np.load(stored) as file:
        for key in file.files:
            case, field = key.split('/', 1)
            arrays[case][field] = torch.from_numpy(np.array(file[key]))
    return metas, arrays


def write(folder, name, metas, arrays):
    flat = {
        f'{case}/{field}': value.numpy()
        for case, fields in arrays.items()
        for field, value in fields.items()
    }
    # Many small arrays: packed as a whole they are much smaller.
    stored = io.BytesIO()
    np.savez(stored, **flat)
    (folder / f'{name}.npz.xz').write_bytes(
        lzma.compress(stored.getvalue(), preset=9)
    )
    text = json.dumps(metas, indent=1)
    (folder / f'{name}.json').write_text(text + '\n')


# ------------------------------------------------------------------ oracle


def several(meta):
    return isinstance(meta['input'][0], list)


def passes(meta, field):
    """The names of a field of each forward pass."""
    if not several(meta):
        return [field]
    return [f'{field}/{i}' for i in range(len(meta['input']))]


def computed(block, meta, given):
    """One training step, then eval mode, from what is given."""
    block.load_state_dict(group(given, 'state/'))
    block.train()
    inputs = [
        given[name].clone().requires_grad_() for name in passes(meta, 'input')
    ]
    outputs = [block(x) for x in inputs]
    grads = [given[name] for name in passes(meta, 'train/grad_output')]
    sum((y * g).sum() for y, g in zip(outputs, grads)).backward()

    found = dict(zip(passes(meta, 'train/output'), outputs))
    grad_inputs = [x.grad for x in inputs]
    found.update(zip(passes(meta, 'train/grad_input'), grad_inputs))
    for name, parameter in block.named_parameters():
        found[f'train/grad/{name}'] = parameter.grad
    for name, buffer in block.named_buffers():
        found[f'train/buffers/{name}'] = buffer
    if not several(meta):
        with torch.no_grad():
            found['eval/output'] = block.eval()(inputs[0])
            kernel, bias = merged(block)
        found.update({'eval/kernel': kernel, 'eval/bias': bias})
    return {name: value.detach().clone() for name, value in found.items()}


def merged(block):
    """Kernel and bias by their own method of merging."""
    if hasattr(block, '_get_kernel_bias'):  # MobileOne's
        return block._get_kernel_bias()
    if hasattr(block, 'merge_dilated_branches'):
        block = copy.deepcopy(block)
        block.merge_dilated_branches()
        return block.lk_origin.weight, block.lk_origin.bias
    return block.get_equivalent_kernel_bias()


def switch(block):
    """Merge in place, by the method that there is."""
    for name in (
        'switch_to_deploy',
        'merge_dilated_branches',
        'merge_kernel',
        'reparameterize',
    ):
        if hasattr(block, name):
            getattr(block, name)()
            return


def group(arrays, prefix):
    return {
        name[len(prefix) :]: value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def drawn(block, meta, generator):
    """What a case is computed from: random state, inputs and gradients.

    Multiples of 1/64 pack well, and their sums and products are rounded less.
    """

    def coarse(values):
        return (values * 64).round() / 64

    def normal(*shape):
        return coarse(torch.randn(*shape, generator=generator))

    def uniform(tensor, low, high):
        values = torch.rand(tensor.shape, generator=generator)
        tensor.copy_(coarse(low + (high - low) * values))

    norms = set()
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                norms.update(id(p) for p in module.parameters())
                uniform(module.running_mean, -1, 1)
                uniform(module.running_var, 0.3, 2)
                uniform(module.weight, -1.5, 1.5)
                uniform(module.bias, -1, 1)
        for parameter in block.parameters():
            if id(parameter) not in norms:
                parameter.copy_(normal(*parameter.shape) / 2)
    given = {
        f'state/{name}': value.clone()
        for name, value in block.state_dict().items()
    }
    shapes = meta['input'] if several(meta) else [meta['input']]
    for i, (name, shape) in enumerate(zip(passes(meta, 'input'), shapes)):
        given[name] = (i + 1) * normal(*shape) + (0.5 - i)
    outputs = [
        copy.deepcopy(block)(given[name]) for name in passes(meta, 'input')
    ]
    for name, y in zip(passes(meta, 'train/grad_output'), outputs):
        given[name] = normal(*y.shape)
    return given


def merging_error(block, x):
    """Largest difference that the papers' own merging makes."""
    with torch.no_grad():
        y = block.eval()(x)
        switch(block)
        return (block(x) - y).abs().max().item()


# ---------------------------------------------------------------- commands


def check(papers, folder, names):
    """How many numbers' largest difference is above the tolerance."""
    wrong = 0
    for name in names:
        metas, arrays = read(folder, name)
        worst = 0
        for case, meta in metas.items():
            stored = arrays[case]
            found = computed(papers.build(meta), meta, stored)
            grads = group(stored, 'train/grad/').values()
            # A gradient that is zero but for rounding has no size.
            family = max(g.abs().max() for g in grads)
            for field, value in found.items():
                if field not in stored or stored[field].shape != value.shape:
                    print(f'{name}/{case}/{field}: not stored in this shape')
                    wrong += 1
                    continue
                expected = stored[field].double()
                scale = expected.abs().max()
                if field.startswith('train/grad/') and scale < 1e-3 * family:
                    scale = family
                error = (value.double() - expected).abs().max()
                error = (error / scale.clamp_min(1e-300)).item()
                worst = max(worst, error)
                if not error <= TOLERANCE:
                    print(f'{name}/{case}/{field}: {error:.1e}')
                    wrong += 1
        print(f'{name}: {len(metas)} cases, at most {worst:.1e} away')
    return wrong


def record(papers, folder, names, seed):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == 'two_forwards':
            metas = copy.deepcopy(TWO_FORWARDS)
        else:
            metas = json.loads((HERE / f'{name}.json').read_text())
        arrays = {}
        for i, (case, meta) in enumerate(metas.items()):
            torch.manual_seed(seed + i)
            generator = torch.Generator().manual_seed(seed + i)
            block = papers.build(meta)
            given = drawn(block, meta, generator)
            arrays[case] = {**given, **computed(block, meta, given)}
            if not several(meta):
                meta['official_train_vs_deploy_max_abs_error'] = merging_error(
                    block, given['input']
                )
        write(folder, name, metas, arrays)
        print(f'{name}: {len(metas)} cases')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        '--checkouts',
        type=Path,
        required=True,
        help=f'folder with {", ".join(CHECKOUTS)}; what the files need',
    )
    parser.add_argument('--files', nargs='+', choices=FILES, default=FILES)
    parser.add_argument('--seed', type=int, default=0)
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument(
        '--check',
        type=Path,
        nargs='?',
        const=HERE,
        metavar='FOLDER',
        help='of the files, by default those beside this script',
    )
    ways.add_argument(
        '--out', type=Path, metavar='FOLDER', help='where new files go'
    )
    args = parser.parse_args()

    # The papers' code makes some constants in the default type.
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    papers = Papers(args.checkouts)
    if args.out:
        record(papers, args.out, args.files, args.seed)
    elif check(papers, args.check, args.files):
        sys.exit(1)


if __name__ == '__main__':
    main()
