"""What works where nothing but torch and numpy is installed.

    python tests/torch_alone.py

imports every module below `mmdbb.mm`, trains, merges, inserts, loads and
writes, and refuses mmdbb to import anything else meanwhile.
"""

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

#: What belongs to the upper storey.
UPPER = ('mm', 'backbones', 'deploy', 'export', 'quantize', 'prune')
#: Python 3.9 does not name its own modules; there only hosts are refused.
OWN = getattr(sys, 'stdlib_module_names', None)
ALLOWED = {'mmdbb', 'torch', 'numpy', *(OWN or ())}
HOSTS = ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg')


class Refusing:
    """Refuses the hosts, and to mmdbb all but torch, numpy and Python."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        frame = sys._getframe(1)
        while frame and 'importlib' in frame.f_code.co_filename:
            frame = frame.f_back
        asker = frame.f_globals.get('__name__', '') if frame else ''
        by_mmdbb = asker.partition('.')[0] == 'mmdbb'
        other = OWN is not None and by_mmdbb and top not in ALLOWED
        if top in HOSTS or other:
            raise ModuleNotFoundError(f'{asker} imports {name}', name=name)


def lower_modules():
    import mmdbb

    names = ['mmdbb']
    for path in mmdbb.__path__:
        for info in pkgutil.iter_modules([path], 'mmdbb.'):
            if info.name.split('.')[1] not in UPPER:
                names.append(info.name)
                if info.ispkg:
                    folder = str(Path(path, *info.name.split('.')[1:]))
                    names += [
                        inner.name
                        for inner in pkgutil.iter_modules(
                            [folder], f'{info.name}.'
                        )
                    ]
    return names


def train(kind, norm):
    """A step of a small network of blocks, then the same network merged."""
    import mmdbb
    from mmdbb.registry import BLOCKS

    block = BLOCKS.get(kind)
    norm_cfg = {} if kind == 'OREPA' else dict(norm_cfg=dict(type=norm))
    model = nn.Sequential(
        block(3, 8, 3, padding=1, **norm_cfg),
        nn.BatchNorm2d(8) if kind == 'OREPA' else nn.Identity(),
        nn.ReLU(),
        block(8, 4, 3, stride=2, padding=1, groups=2, **norm_cfg),
    )
    inner = [type(m) for m in model[0].modules()]
    if norm_cfg:
        assert dict(BN=nn.BatchNorm2d, SyncBN=nn.SyncBatchNorm)[norm] in inner
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(2, 3, 8, 6)).square().mean().backward()
        optimizer.step()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.parameters())
    )
    model.eval()
    images = torch.rand(2, 3, 8, 6)
    merged = mmdbb.reparameterize(model)
    assert type(merged[0]) is type(merged[3]) is nn.Conv2d
    assert torch.allclose(merged(images), model(images), atol=1e-5)
    return model


def insert_load_write():
    import mmdbb
    from mmdbb.files.checkpoints import read_checkpoint
    from mmdbb.files.formats import write_checkpoint

    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    images = torch.rand(2, 3, 8, 6)
    expected = plain(images)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, 'plain.pth'))
        torch.save(plain.state_dict(), path)
        model = nn.Sequential(mmdbb.DBB(3, 8, 3)).eval()
        conv = {k: v for k, v in plain.state_dict().items() if k[0] == '0'}
        mmdbb.load_plain_weights_(model, conv)
        assert torch.allclose(model(images), plain[0](images), atol=1e-5)
        assert list(mmdbb.insert_blocks_(plain)) == ['0']
        assert torch.allclose(plain(images), expected, atol=1e-5)
        read = read_checkpoint(path)['state_dict']
        assert set(read) > set(conv)
        write_checkpoint(f'{folder}/own.pth', model.state_dict(), {})
        again = nn.Sequential(mmdbb.DBB(3, 8, 3)).eval()
        again.load_state_dict(
            read_checkpoint(f'{folder}/own.pth')['state_dict']
        )
        assert torch.equal(again(images), model(images))
        try:
            mmdbb.load_plain_weights_(again, 'torchvision://resnet18')
        except Exception as error:
            assert 'mmengine is not installed' in str(error), error
        else:
            raise AssertionError('read an address without mmengine')


def main():
    sys.meta_path.insert(0, Refusing())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name in lower_modules():
        importlib.import_module(name)
    assert torch.equal(torch.get_rng_state(), before), 'imports draw numbers'
    for kind in ('DBB', 'ACB', 'RepVGGConv', 'OREPA'):
        for norm in ('BN', 'SyncBN'):
            train(kind, norm)
    insert_load_write()
    assert not set(HOSTS) & set(sys.modules)
    assert 'mmdbb.mm' not in sys.modules
    print(len(lower_modules()), 'modules')


if __name__ == '__main__':
    main()
