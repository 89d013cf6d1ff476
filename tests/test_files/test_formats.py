"""safetensors files, precisions, and files that hold more than data."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import deploy, distance, image
from mmengine.config import Config
from networks import write_checkpoint, write_config

from mmdbb import load_deployed
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.files.formats import SUFFIXES, is_safetensors
from mmdbb.files.formats import write_checkpoint as write
from mmdbb.mm.deploy.load import build_model

pytestmark = pytest.mark.usefixtures('quiet')
STATE = dict(
    weight=torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    half=torch.ones(2, dtype=torch.float16),
    count=torch.tensor(3),
)
META = dict(
    epoch=3, names=('a', 'b'), cfg='x = 1', mmdbb=dict(structure='stock')
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder, 'classifier')
    return config, write_checkpoint(config, folder / 'trained.pth')


def run(trained, out, **options):
    return deploy(
        Config.fromfile(trained[0]),
        options.pop('checkpoint', trained[1]),
        str(out),
        image_size=(32, 24),
        **options,
    )


# safetensors


@pytest.fixture
def safetensors():
    return pytest.importorskip('safetensors.torch')


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_there_and_back(tmp_path, safetensors, suffix):
    path = str(tmp_path / f'a{suffix}')
    tied = dict(STATE, tied=STATE['weight'], view=STATE['weight'][:1])
    odd = dict(META, odd=object(), nothing=None, number=float('inf'))
    write(path, tied, odd)
    assert is_safetensors(path) is (suffix == '.safetensors')
    found = read_checkpoint(path)
    assert found['state_dict'].keys() == tied.keys()
    for key, value in tied.items():
        assert torch.equal(found['state_dict'][key], value)
        assert found['state_dict'][key].dtype == value.dtype
    assert list(found['meta'].pop('names')) == ['a', 'b']
    rest = dict(META, nothing=None, number=float('inf'))
    assert len(found['meta']['mmdbb'].pop('weights_sha256')) == 64
    assert found['meta'] == {k: v for k, v in rest.items() if k != 'names'}


def test_the_content_says_the_form(tmp_path, safetensors):
    write(str(tmp_path / 'a.safetensors'), STATE, {})
    write(str(tmp_path / 'b.pth'), STATE, {})
    os.rename(tmp_path / 'a.safetensors', tmp_path / 'a.pth')
    os.rename(tmp_path / 'b.pth', tmp_path / 'b.safetensors')
    for name in ('a.pth', 'b.safetensors'):
        found = read_checkpoint(str(tmp_path / name))
        assert found['state_dict'].keys() == STATE.keys()


def test_another_programs_file(tmp_path, safetensors):
    path = str(tmp_path / 'a.safetensors')
    state = {f'module.{k}': v.contiguous() for k, v in STATE.items()}
    for metadata in (None, dict(meta='not JSON'), dict(meta='[1]', a='b')):
        safetensors.save_file(state, path, metadata)
        found = read_checkpoint(path)
        assert found['meta'] == {}
        assert found['state_dict'].keys() == STATE.keys()


@pytest.mark.parametrize('keep', [5, 40, -3])
def test_truncated(tmp_path, safetensors, keep):
    path = tmp_path / 'a.safetensors'
    write(str(path), STATE, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match='a.safetensors is not a safetensors file, or is trun'
    ):
        read_checkpoint(str(path))


def test_values_are_checked_too(tmp_path, safetensors):
    path = str(tmp_path / 'a.safetensors')
    write(path, dict(w=torch.tensor([float('nan')])), {})
    with pytest.raises(UserError, match='values that are not finite: w'):
        read_checkpoint(path)


def test_deploys_from_and_to(trained, tmp_path, safetensors):
    first = run(trained, tmp_path / 'a.safetensors')
    assert sorted(os.listdir(tmp_path)) == ['a.py', 'a.safetensors']
    loaded = read_checkpoint(first.checkpoint)
    own = loaded['meta']['mmdbb']
    assert own['structure'] == 'stock' and own['tolerance'] == 1e-9
    assert own['max_error'] == first.difference.largest
    assert loaded['meta']['epoch'] == 3
    model = load_deployed(first.config, first.checkpoint)

    source = read_checkpoint(trained[1])
    write(str(tmp_path / 'in.safetensors'), source['state_dict'], {})
    second = run(
        trained,
        tmp_path / 'b.pth',
        checkpoint=str(tmp_path / 'in.safetensors'),
    )
    found = load_deployed(second.config, second.checkpoint)
    for a, b in zip(found.parameters(), model.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match='merged already .structure: stock'):
        run(trained, tmp_path / 'c.pth', checkpoint=first.checkpoint)


MISSING = """
import sys

sys.modules['safetensors'] = None  # as if it were not installed
import torch
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.files.formats import write_checkpoint
from mmdbb.errors import UserError

for call in (
    lambda: read_checkpoint('a.safetensors'),
    lambda: write_checkpoint('b.safetensors', dict(w=torch.ones(1)), {}),
):
    try:
        call()
    except UserError as error:
        print(error)
"""


def test_package_is_missing(tmp_path, safetensors):
    write(str(tmp_path / 'a.safetensors'), STATE, {})
    found = subprocess.run(
        [sys.executable, '-c', MISSING],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == [
        f'{name}.safetensors needs safetensors (import of safetensors halted; '
        'None in sys.modules); in the checkout of mmdbb: python -m pip '
        'install -e ".[formats]"'
        for name in 'ab'
    ]
    assert os.listdir(tmp_path) == ['a.safetensors']


# Precisions

X = image(2, 3, 32, 24, dtype=torch.float32)


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize(
    'dtype, bound',
    [
        (torch.float64, 1e-5),
        (torch.float16, 1e-2),
        (torch.bfloat16, 1e-1),
    ],
)
def test_precision_is_kept(trained, tmp_path, dtype, bound, fuse):
    model = build_model(Config.fromfile(trained[0]))
    state = read_checkpoint(trained[1])['state_dict']
    model.load_state_dict(state)
    model = model.to(dtype)
    torch.save(model.state_dict(), tmp_path / 'in.pth')
    result = run(
        trained,
        tmp_path / 'a.pth',
        checkpoint=str(tmp_path / 'in.pth'),
        fuse=fuse,
    )
    written = read_checkpoint(result.checkpoint)['state_dict']
    for name, value in written.items():
        is_count = name.endswith('num_batches_tracked')
        assert value.dtype == (torch.int64 if is_count else dtype), name
    # The merge is proven before it is rounded.
    assert result.difference.largest < 1e-10
    assert result.tolerance == 1e-9
    found = load_deployed(result.config, result.checkpoint)
    assert distance(found(X), model.float()(X)) < bound


def test_mixed_precisions(trained, tmp_path):
    """Kernels in half precision, norms in single: each stays."""
    state = read_checkpoint(trained[1])['state_dict']
    mixed = {
        k: v.half() if k.endswith('conv.weight') else v
        for k, v in state.items()
    }
    torch.save(mixed, tmp_path / 'in.pth')
    result = run(
        trained, tmp_path / 'a.pth', checkpoint=str(tmp_path / 'in.pth')
    )
    written = read_checkpoint(result.checkpoint)['state_dict']
    assert written['head.fc.weight'].dtype == torch.float32
    assert written['backbone.conv1.weight'].dtype == torch.float32
    kernel = written['backbone.layer1.0.conv1.weight']
    assert kernel.dtype == torch.float16


def test_composed_in_float32(trained, tmp_path):
    states = [
        read_checkpoint(
            run(trained, tmp_path / f'{dtype}.pth', dtype=dtype).checkpoint
        )['state_dict']
        for dtype in (torch.float64, torch.float32)
    ]
    kernels = [s['backbone.layer1.0.conv1.weight'] for s in states]
    assert 0 < distance(*kernels) < 1e-5
    assert kernels[1].dtype == torch.float32
    with pytest.raises(UserError, match='dtype must be one of .*float16'):
        run(trained, tmp_path / 'c.pth', dtype=torch.float16)


# Files that hold more than data


class Notes:
    """What some training code puts beside the weights."""

    def __reduce__(self):
        return (os.mkdir, ('ran',))


def test_unsafe_load(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.load(trained[1])['state_dict']
    torch.save(dict(state_dict=state, meta=dict(notes=Notes())), 'in.pth')
    with pytest.raises(
        UserError,
        match='mkdir, which is not allowed in a checkpoint; --unsafe-load '
        'reads it, but runs any code in it: only for files that you trust',
    ):
        run(trained, 'a.pth', checkpoint='in.pth')
    assert os.listdir() == ['in.pth']
    result = run(trained, 'a.pth', checkpoint='in.pth', unsafe=True)
    assert os.path.isdir('ran')
    assert result.blocks == 8


def test_network_saved_whole(trained, tmp_path):
    model = build_model(Config.fromfile(trained[0]))
    path = str(tmp_path / 'in.pth')
    for content in (model, dict(model=model, epoch=3)):
        torch.save(content, path)
        with pytest.raises(UserError, match='ImageClassifier, which is not a'):
            read_checkpoint(path)
        found = read_checkpoint(path, unsafe=True)
        assert found['state_dict'].keys() == model.state_dict().keys()
