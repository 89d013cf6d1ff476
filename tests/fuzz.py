"""Damaged files by the thousand, from a seed: what do all readers say?

  python tests/fuzz.py --cases 100000 --seed 1

makes them of small real files of all forms: bytes that are changed anywhere,
and pickles that are changed inside of an archive whose sums fit again. Each is
given to one of the readers. It prints how many were refused, read right, and
taken for something else, which only forms without sums can be; and every
fault: another error than the one line for users, or one that takes long.
"""

import argparse
import contextlib
import io
import os
import random
import tempfile
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdbb import DBB, load_plain_weights_
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import load_strictly, read_checkpoint
from mmdbb.files.formats import write_checkpoint
from mmdbb.mm.engine.resume import check_resumable
from mmdbb.mm.official.convert import read_official
from mmdbb.mm.structure import written_structure

OUTCOMES = ('refused', 'right', 'other', 'fault')
#: Form -> at what it is damaged, where not only at its bytes.
LAYERS = dict.fromkeys(('run.pth', 'bare.pth'), ('bytes', 'pickle'))
#: Seconds that a small file may take.
LONGEST = 5.0
#: Form -> whether damage of its weights can be seen.
SUMS = {
    'run.pth': True,
    'bare.pth': True,
    'deflated.pth': True,
    'plain.pth': True,
    'own.safetensors': True,
    'legacy.pth': False,
    'theirs.safetensors': False,
    'papers.hdf5': False,
}


class Case(NamedTuple):
    """What is damaged, and who reads it."""

    name: str
    layer: str
    reader: str


def network():
    torch.manual_seed(0)  # what a file does not have stays as it starts
    return nn.Sequential(DBB(2, 2, 3, padding=1), nn.BatchNorm2d(2)).eval()


def plain_state():
    return nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)).state_dict()


def sources(folder):
    """Real files of all forms: name -> bytes, as far as can be written."""
    state = network().state_dict()
    buffer = HistoryBuffer()
    buffer.update(1.0)
    hub = dict(
        log_scalars=dict(loss=buffer),
        runtime_info=dict(best_score=np.float64(3), keep_ckpt_ids=[1]),
        resumed_keys=dict(loss=True),
    )
    run = dict(
        state_dict=state,
        ema_state_dict={f'module.{k}': v for k, v in state.items()},
        meta=dict(epoch=1, iter=3, cfg='x = 1', seed=np.int64(3)),
        message_hub=hub,
        optimizer=dict(state={}, param_groups=[dict(lr=0.1, params=[0])]),
    )
    run['ema_state_dict']['steps'] = torch.tensor(3)
    torch.save(run, folder / 'run.pth')
    torch.save(state, folder / 'bare.pth')
    torch.save(
        state, folder / 'legacy.pth', _use_new_zipfile_serialization=False
    )
    torch.save(plain_state(), folder / 'plain.pth')
    repacked(folder / 'bare.pth', folder / 'deflated.pth')
    with contextlib.suppress(UserError, ImportError):
        path = str(folder / 'own.safetensors')
        write_checkpoint(path, state, run['meta'])
        import safetensors.torch

        path = folder / 'theirs.safetensors'
        path.write_bytes(safetensors.torch.save(state))
    with contextlib.suppress(ImportError):
        import h5py

        with h5py.File(folder / 'papers.hdf5', 'w') as file:
            for name, value in state.items():
                if value.is_floating_point():
                    file[name] = value.numpy()
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def repacked(source, target, change=lambda pickled: pickled):
    """Write an archive again, its pickle changed and its sums right."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, 'w', zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name.endswith('data.pkl'):
                content = change(content)
            new.writestr(name, content)


def flip(data, draw):
    for _ in range(draw.choice([1, 1, 2, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def overwrite(data, draw):
    start = draw.randrange(len(data))
    size = draw.choice([1, 2, 4, 8, 64])
    data[start : start + size] = bytes(
        draw.choice([0, 255, draw.randrange(256)]) for _ in range(size)
    )


def cut(data, draw):
    del data[draw.randrange(len(data)) :]


def remove(data, draw):
    start = draw.randrange(len(data))
    del data[start : start + draw.choice([1, 4, 64, 500])]


def insert(data, draw):
    start = draw.randrange(len(data))
    data[start:start] = bytes(draw.randrange(256) for _ in range(9))


def repeat(data, draw):
    start = draw.randrange(len(data))
    data[start:start] = data[start : start + draw.choice([1, 16, 200])]


def swap(data, draw):
    """Opcodes and names of the pickle, rather than the numbers."""
    words = [b'state_dict', b'running_var', b'FloatStorage', b'cpu', b'_rebui']
    at = data.find(draw.choice(words))
    if at >= 0:
        data[at + draw.randrange(8)] = draw.randrange(256)


MUTATIONS = (flip, overwrite, cut, remove, insert, repeat, swap)


def loaded(path):
    content = read_checkpoint(path)
    written_structure(content)
    load_strictly(network(), content['state_dict'], path)
    return content['state_dict']


def resumed(path):
    content = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
    check_resumable(content, path)
    return content['state_dict']


def plain(path):
    model = network()
    load_plain_weights_(model, path)
    return model.state_dict()


def host(path):
    content = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
    return content.get('state_dict', content)


READERS = dict(
    loaded=loaded,
    resumed=resumed,
    plain=plain,
    host=host,
    papers=read_official,
)
#: Form -> who reads it, where not all that read networks with blocks do.
READERS_OF = {
    'run.pth': ('loaded', 'resumed', 'host', 'papers'),
    'plain.pth': ('plain', 'host'),
    'papers.hdf5': ('papers',),
}


def outcome(case, path, expected):
    """What a reader makes of a file."""
    start = time.monotonic()
    try:
        state = READERS[case.reader](path)
    except UserError as error:
        found = 'fault' if '\n' in str(error) else 'refused'
        state = None
    except Exception:
        traceback.print_exc()
        return 'fault'
    if time.monotonic() - start > LONGEST:
        return 'fault'
    if state is None:
        return found
    same = state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in state
    )
    return 'right' if same else 'other'


def fuzz(folder, cases, seed):
    """Damage files and read them: Case -> outcome -> how many."""
    originals = folder / 'originals'
    originals.mkdir()
    found = sources(originals)
    draw = random.Random(seed)
    counts = defaultdict(Counter)
    readers = {
        name: READERS_OF.get(name, ('loaded', 'host', 'papers'))
        for name in found
    }
    expected = {
        (name, reader): READERS[reader](str(originals / name))
        for name in found
        for reader in readers[name]
    }
    for number in range(cases):
        name = draw.choice(list(found))
        layer = draw.choice(LAYERS.get(name, ('bytes',)))
        case = Case(name, layer, draw.choice(readers[name]))
        path = folder / f'damaged-{name}'

        def damaged(content):
            data = bytearray(content)
            for _ in range(draw.choice([1, 1, 1, 3])):
                if data:
                    draw.choice(MUTATIONS)(data, draw)
            return bytes(data)

        if case.layer == 'pickle':
            repacked(originals / name, path, damaged)
        else:
            path.write_bytes(damaged(found[name]))
        result = outcome(case, str(path), expected[name, case.reader])
        if result == 'fault':
            kept = folder / f'fault-{seed}-{number}-{case.reader}-{name}'
            kept.write_bytes(path.read_bytes())
            print(f'fault: {case}: {kept}')
        counts[case][result] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', type=int, default=20_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--keep', help='folder for the files with faults')
    args = parser.parse_args()
    folder = Path(args.keep or tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        counts = fuzz(folder, args.cases, args.seed)
    faults = [s for s in said.getvalue().splitlines() if 'fault: ' in s]
    rows = defaultdict(Counter)
    for case, found in counts.items():
        rows[case.name, case.layer].update(found)
    print(f'| File | Changed | {" | ".join(OUTCOMES)} |')
    print('|---|---|' + '---|' * len(OUTCOMES))
    for (name, layer), found in sorted(rows.items()):
        numbers = ' | '.join(str(found[o]) for o in OUTCOMES)
        print(f'| {name} | {layer} | {numbers} |')
    seconds = time.monotonic() - start
    print(f'{args.cases} cases, seed {args.seed}, {seconds:.0f} s')
    print(*faults, sep='\n')
    raise SystemExit(1 if faults else 0)


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main()
