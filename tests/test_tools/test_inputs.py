"""What tools are given to read: any file, of any kind, and nothing is lost."""

import os
import shutil
import signal
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from helpers import run_tool
from mmengine.config import Config
from networks import SIZE, write_checkpoint, write_config

from mmdbb import load_plain_weights_
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_checkpoint, read_content
from mmdbb.files.hdf5 import read_hdf5
from mmdbb.mm.deploy.load import build_model, load_deployed
from mmdbb.mm.outputs import refuse_inputs
from mmdbb.mm.quantization.network import load_network

pytestmark = pytest.mark.usefixtures('quiet')


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """Config and checkpoint of a small classifier."""
    folder = tmp_path_factory.mktemp('pair')
    config = write_config(folder, 'classifier')
    return config, write_checkpoint(config, folder / 'trained.pth')


@pytest.fixture
def in_time():
    """A hang ends the test."""

    def late(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(capfd, match, name, *arguments):
    """A tool says so in one line, by exit code 2."""
    assert run_tool(name, *arguments) == 2
    error = capfd.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith(f'{name}.py: ') and match in line, error
    assert 'Traceback' not in error
    assert len(line) < 2000


# Inputs are not overwritten


def test_no_file_of_the_config_is_overwritten(pair, tmp_path, capfd):
    """Nor are images: whoever asks for it by --force."""
    shutil.copy(pair[0], tmp_path / 'far.py')
    (tmp_path / 'base.py').write_text("_base_ = './far.py'\n")
    (tmp_path / 'values.json').write_text('{"x": 1}')
    (tmp_path / 'child.py').write_text(
        "_base_ = './base.py'\n"
        'import json\n'
        f'x = json.load(open({str(tmp_path / "values.json")!r}))["x"]\n'
        'del json\n'
    )
    image = tmp_path / 'image.pth'
    picture(image, 24, 32)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for name in ('base.pth', 'far.pth', 'child.pth', 'image.pth'):
        refused(
            capfd,
            'is also an input',
            'reparam',
            tmp_path / 'child.py',
            pair[1],
            tmp_path / name,
            '--images',
            image,
            '--force',
        )
    cfg = Config.fromfile(tmp_path / 'child.py')
    with pytest.raises(UserError, match='far.py is also an input'):
        refuse_inputs([str(tmp_path / 'far.py')], cfg)
    (tmp_path / 'link.py').symlink_to('far.py')
    with pytest.raises(UserError, match='link.py is also an input'):
        refuse_inputs([str(tmp_path / 'link.py')], cfg)
    (tmp_path / 'link.py').unlink()
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after == before


def test_a_file_that_a_config_reads_is_not_overwritten(tmp_path):
    from mmdbb.mm.config_files import files_of, noting_files, remember_files

    (tmp_path / 'values.json').write_text('{"x": 1}')
    (tmp_path / 'config.py').write_text(
        f'x = open({str(tmp_path / "values.json")!r}).read()\n'
    )
    with noting_files() as files:
        cfg = Config.fromfile(tmp_path / 'config.py')
        with open(tmp_path / 'written', 'w'):
            pass
    remember_files(cfg, files)
    assert str(tmp_path / 'values.json') in files_of(cfg)
    assert str(tmp_path / 'written') not in files_of(cfg)
    with pytest.raises(UserError, match='also an input'):
        refuse_inputs([str(tmp_path / 'values.json')], cfg)


COPIES = {
    'its folder': lambda folder: folder,
    'a link to its folder': lambda folder: link(folder, 'folder'),
    'a folder with a link': lambda folder: link(folder, 'soft'),
    'a folder with a hard link': lambda folder: link(folder, 'hard'),
    'a folder with its base': lambda folder: folder / 'bases',
}


def link(folder, kind):
    other = folder.parent / kind
    if kind == 'folder':
        other.symlink_to(folder)
    else:
        other.mkdir()
        make = os.symlink if kind == 'soft' else os.link
        make(folder / 'run.py', other / 'run.py')
    return other


@pytest.mark.parametrize('case', COPIES)
def test_mmengines_copy_of_the_config_is_not_written_over_it(
    pair, tmp_path, capfd, case
):
    folder = tmp_path / 'configs'
    (folder / 'bases').mkdir(parents=True)
    shutil.copy(pair[0], folder / 'bases' / 'run.py')
    (folder / 'run.py').write_text("_base_ = './bases/run.py'  # mine\n")
    work_dir = COPIES[case](folder)
    before = tree(tmp_path)
    for name, *more in (('train',), ('test', pair[1])):
        refused(
            capfd,
            'which is an input; choose another --work-dir',
            name,
            folder / 'run.py',
            *more,
            *('--work-dir', work_dir),
        )
    assert tree(tmp_path) == before


def tree(folder):
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_predictions_are_not_written_over_inputs(pair, tmp_path, capfd):
    shutil.copy(pair[1], tmp_path / 'x.pkl')
    (tmp_path / 'soft.pkl').symlink_to('x.pkl')
    os.link(tmp_path / 'x.pkl', tmp_path / 'hard.pkl')
    (tmp_path / 'base.pkl').write_text('3')
    config = tmp_path / 'run.py'
    config.write_text(
        f'_base_ = {str(pair[0])!r}\n'
        f'x = int(open({str(tmp_path / "base.pkl")!r}).read())\n'
    )
    before = tree(tmp_path)
    for name in ('x', 'soft', 'hard', 'base'):
        refused(
            capfd,
            f'{name}.pkl is also an input',
            'test',
            *(config, tmp_path / 'x.pkl', '--work-dir', tmp_path / 'work'),
            *('--out', tmp_path / f'{name}.pkl'),
        )
    assert tree(tmp_path) == before


# Kinds of files


def picture(path, height, width):
    """A PNG that claims a size."""

    def part(kind, data):
        crc = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + crc

    rows = bytes(height * (1 + 3 * width)) if height * width < 10**6 else b''
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + part(b'IHDR', head)
        + part(b'IDAT', zlib.compress(rows))
        + part(b'IEND', b'')
    )


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to('/dev/zero')


def loop(path):
    path.symlink_to(path.name)


def socket_file(path):
    os.mknod(path, 0o600 | 0o140000)


KINDS = {
    'fifo': (fifo, 'a pipe or a device'),
    'device': (device, 'a pipe or a device'),
    'loop': (loop, ''),
    'socket': (socket_file, 'a pipe or a device'),
    'folder': (os.mkdir, ''),
    'empty': (lambda path: path.touch(), 'empty'),
}


@pytest.mark.parametrize('kind', KINDS)
def test_files_that_are_none(pair, trained, tmp_path, kind, capfd, in_time):
    make, match = KINDS[kind]
    for suffix in ('.pth', '.png', '.onnx', '.py'):
        make(tmp_path / f'a{suffix}')
    config, checkpoint = pair
    out = tmp_path / 'out.pth'
    bad = tmp_path / 'a.pth'
    work = ('--work-dir', tmp_path / 'work')
    start = f'load_from={bad}'
    calls = [
        ('reparam', config, bad, out),
        ('reparam', tmp_path / 'a.py', checkpoint, out),
        ('convert_official', bad, out),
        ('test', config, bad, *work),
        ('train', config, *work, '--resume', bad),
        ('train', config, *work, '--cfg-options', start),
    ]
    if kind not in ('empty', 'folder', 'loop'):
        images = ('--images', tmp_path / 'a.png')
        calls.append(('reparam', config, checkpoint, out, *images))
    for call in calls:
        refused(capfd, match, *call)
    assert not out.exists()
    pytest.importorskip('onnxruntime')
    cfg = trained('classification')[0].filename
    files = tmp_path / 'a.onnx', tmp_path / 'out.onnx'
    refused(capfd, match, 'quantize', cfg, *files)


def test_a_loop_of_links_as_the_output(pair, tmp_path, capfd):
    loop(tmp_path / 'out.pth')
    size = ('--image-size', *SIZE)
    refused(capfd, 'output exists', 'reparam', *pair, tmp_path / 'out.pth')
    out = tmp_path / 'out.pth'
    assert run_tool('reparam', *pair, out, '--force', *size) == 0
    assert not out.is_symlink()  # nobody can follow it: it is replaced


def test_the_longest_name(pair, tmp_path):
    out = tmp_path / ('a' * 251 + '.pth')
    for _ in range(2):
        arguments = ('--force', '--image-size', *SIZE)
        assert run_tool('reparam', *pair, out, *arguments) == 0


def test_an_image_that_claims_to_be_large(pair, tmp_path, capfd, in_time):
    picture(tmp_path / 'a.png', 50_000, 50_000)
    refused(
        capfd,
        'cannot read image',
        'reparam',
        *pair,
        tmp_path / 'out.pth',
        '--images',
        tmp_path / 'a.png',
    )


# Forms of content


def classifier_state(pair):
    return read_checkpoint(pair[1])['state_dict']


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def in_itself():
    meta = {}
    meta['self'] = meta
    return meta


def shadowed(value):
    parameter = torch.nn.Parameter(value)
    for name in ('numel', 'sum', 'is_floating_point', 'dim', 'shape'):
        parameter.__dict__[name] = 3
    return parameter


CONTENTS = {
    'a nested tensor': lambda s: dict(s, w=nested()),
    'meta in itself': lambda s: dict(state_dict=s, meta=in_itself()),
    'a pruned network of other shapes': lambda s: dict(
        state_dict={k: v.reshape(-1) for k, v in s.items()},
        meta=dict(mmdbb=dict(structure='pruned')),
    ),
    'a pruned network of nothing': lambda s: dict(
        state_dict={k: v.reshape(-1)[:0] for k, v in s.items()},
        meta=dict(mmdbb=dict(structure='pruned')),
    ),
    'a structure of numbers': lambda s: dict(
        state_dict=dict(w=s['head.fc.weight']),
        meta=dict(mmdbb=dict(structure=np.zeros(2))),
    ),
    'ranges of nothing': lambda s: {
        **s,
        'head.weight_quantizer.fake_quant_enabled': torch.ones(0),
        'head.weight_quantizer.limit': torch.ones(0),
    },
}


@pytest.mark.parametrize('case', CONTENTS)
def test_contents_of_other_forms(pair, tmp_path, case):
    path = str(tmp_path / 'a.pth')
    torch.save(CONTENTS[case](classifier_state(pair)), path)
    for read in (
        lambda: load_deployed(str(pair[0]), path),
        lambda: load_network(build_model(Config.fromfile(pair[0])), path),
    ):
        with pytest.raises(UserError) as error:
            read()
        assert '\n' not in str(error.value)


def test_attributes_that_shadow_methods(pair, tmp_path):
    state = {
        k: shadowed(v)
        for k, v in classifier_state(pair).items()
        if v.is_floating_point()
    }
    state['head.fc.bias'].data.fill_(float('nan'))
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='not finite: head.fc.bias'):
        read_checkpoint(str(tmp_path / 'a.pth'))
    content = read_content(str(tmp_path / 'a.pth'))
    assert content['head.fc.bias'].numel() == 3


def test_a_plain_weight_of_no_dimension():
    from mmdbb import DBB

    model = torch.nn.Sequential(DBB(3, 8, 3))
    with pytest.raises(UserError, match='kernel has shape'):
        load_plain_weights_(model, {'0.weight': torch.tensor(1.0)})


def test_meta_of_complex_numbers(pair, tmp_path):
    pytest.importorskip('safetensors')
    source = tmp_path / 'a.pth'
    large = torch.ones(1).expand(3 * 10**6)
    meta = dict(x=torch.ones(2) * 1j, y=[1j], z=large, kept=torch.ones(2))
    torch.save(dict(state_dict=classifier_state(pair), meta=meta), source)
    out = tmp_path / 'out.safetensors'
    size = ('--image-size', *SIZE)
    assert run_tool('reparam', pair[0], source, out, *size) == 0
    meta = read_checkpoint(str(out))['meta']
    assert meta['kept'] == [1.0, 1.0]
    assert not {'x', 'y', 'z'} & meta.keys()


def test_a_long_name(pair, tmp_path, capfd, in_time):
    name = 'module.' * 200_000
    torch.save({name + 'w': torch.ones(1)}, tmp_path / 'a.pth')
    out = tmp_path / 'out.pth'
    refused(
        capfd, 'merged already', 'reparam', pair[0], tmp_path / 'a.pth', out
    )
    torch.save({'x' * 10**5: torch.tensor([np.nan])}, tmp_path / 'a.pth')
    refused(
        capfd,
        '(100,000 characters)',
        'reparam',
        pair[0],
        tmp_path / 'a.pth',
        out,
    )


def test_weights_that_are_no_numbers_do_not_start_a_training(
    pair, tmp_path, capfd
):
    state = classifier_state(pair)
    state['head.fc.bias'].fill_(float('nan'))
    torch.save(dict(state_dict=state), tmp_path / 'nan.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save({3: torch.ones(2)}, tmp_path / 'key.pth')
    whole = (tmp_path / 'nan.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[:-100])
    config = tmp_path / 'config.py'
    from runs import run_config

    run_config(tmp_path / 'work').dump(config)
    for name, match in {
        'nan': 'not finite: head.fc.bias',
        'list': 'holds a list, not a checkpoint',
        'key': 'its keys are no names',
        'cut': 'or is truncated',
    }.items():
        start = f'load_from={tmp_path / name}.pth'
        refused(capfd, match, 'train', config, '--cfg-options', start)
    assert not list((tmp_path / 'work').glob('*.pth'))


# HDF5

h5py = pytest.importorskip('h5py')


def hdf5(path, fill):
    with h5py.File(path, 'w') as file:
        fill(file)
    return str(path)


def external(file):
    file.create_dataset('w', (7,), 'f4', external=[(other_path(file), 0, 28)])


def other_path(file):
    path = os.path.join(os.path.dirname(file.filename), 'other')
    with open(path, 'wb') as other:
        other.write(b'secret bytes of another file')
    return path


def linked(file):
    path = os.path.join(os.path.dirname(file.filename), 'other.h5')
    with h5py.File(path, 'w') as other:
        other['w'] = np.ones(3)
    file['w'] = h5py.ExternalLink(path, 'w')


def virtual(file):
    path = os.path.join(os.path.dirname(file.filename), 'other.h5')
    with h5py.File(path, 'w') as other:
        other['w'] = np.ones(3)
    layout = h5py.VirtualLayout((3,), 'f8')
    layout[:] = h5py.VirtualSource(path, 'w', (3,))
    file.create_virtual_dataset('w', layout)


def to_a_pipe(file):
    path = os.path.join(os.path.dirname(file.filename), 'pipe')
    os.mkfifo(path)
    file['w'] = h5py.ExternalLink(path, 'w')


def no_text(file):
    h5py.h5d.create(
        file.id,
        b'\xff\xfe',
        h5py.h5t.NATIVE_FLOAT,
        h5py.h5s.create_simple((2,)),
    )


HDF5 = {
    'storage in another file': (external, 'keeps w in another file'),
    'a link to another file': (linked, 'has links, which are not followed'),
    'a link to a pipe': (to_a_pipe, 'has links, which are not followed'),
    'a soft link': (
        lambda f: f.update(w=h5py.SoftLink('/w')),
        'has links, which are not followed',
    ),
    'a view of another file': (virtual, 'keeps w in another file'),
    'a claim': (
        lambda f: f.create_dataset('w', (10**12,), 'f4', chunks=(1000,)),
        'too much for its size',
    ),
    'many claims': (
        lambda f: [
            f.create_dataset(f'w{i}', (10**7,), 'f4', chunks=(1000,))
            for i in range(50)
        ],
        'too much for its size',
    ),
    'a name that is no text': (no_text, 'a.h5'),
    'text': (lambda f: f.update(w='text'), 'no numbers in w'),
    'nothing': (lambda f: f.update(w=h5py.Empty('f4')), 'no numbers in w'),
    'a group': (lambda f: f.create_group('w'), 'w is no data set'),
}


@pytest.mark.parametrize('case', HDF5)
def test_hdf5_that_is_refused(tmp_path, case, in_time):
    fill, match = HDF5[case]
    path = hdf5(tmp_path / 'a.h5', fill)
    with pytest.raises(UserError, match=match) as error:
        read_hdf5(path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['>f4', '<f4', '>f8', '>i8', '<f2'])
def test_hdf5_of_any_order_of_bytes(tmp_path, kind):
    numbers = np.array([[1, 2], [3, 4]]).astype(kind)
    path = hdf5(tmp_path / 'a.h5', lambda f: f.update(w=numbers))
    assert np.array_equal(read_hdf5(path)['w'].numpy(), numbers)


# ONNX


def test_onnx_that_points_elsewhere_or_is_no_network(trained, tmp_path, capfd):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')

    def model(values):
        weight = onnx.numpy_helper.from_array(values, 'w')
        shape = [1, 3, *SIZE]
        x = onnx.helper.make_tensor_value_info('x', 1, shape)
        y = onnx.helper.make_tensor_value_info('y', 1, shape)
        node = onnx.helper.make_node('Mul', ['x', 'w'], ['y'])
        graph = onnx.helper.make_graph([node], 'g', [x], [y], [weight])
        return onnx.helper.make_model(graph)

    large = np.ones((1, 3, *SIZE), 'f4')
    onnx.save(
        model(large),
        tmp_path / 'elsewhere.onnx',
        save_as_external_data=True,
        location='data',
        size_threshold=0,
    )
    onnx.save(model(large * np.nan), tmp_path / 'nan.onnx')
    damaged = model(large)
    damaged.graph.initializer[0].raw_data = b'abc'
    onnx.save(damaged, tmp_path / 'damaged.onnx')
    for name, match in {
        'elsewhere': 'keeps the weights w in another file',
        'nan': 'not finite: w',
        'damaged': 'is not an ONNX file: w is damaged',
    }.items():
        refused(
            capfd,
            match,
            'quantize',
            trained('classification')[0].filename,
            tmp_path / f'{name}.onnx',
            tmp_path / 'out.onnx',
        )


def test_time_and_memory_of_bombs(tmp_path, in_time):
    """Some MB that claim to be GB."""
    import resource
    import zipfile

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    head = pickle_of_storage(75 * 10**6)
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w', zipfile.ZIP_DEFLATED) as new:
        new.writestr('archive/data.pkl', head)
        with new.open('archive/data/0', 'w', force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(10**6))
    with zipfile.ZipFile(tmp_path / 'b.pth', 'w', zipfile.ZIP_DEFLATED) as new:
        new.writestr(
            'archive/data.pkl', b'\x80\x02](' + b'}' * 3_000_000 + b'e.'
        )
    for name in 'ab':
        with pytest.raises(UserError, match='too much for|steps'):
            read_content(str(tmp_path / f'{name}.pth'))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 700 << 10  # KiB
    assert time.monotonic() - start < 50


def pickle_of_storage(count):
    import io
    import pickle

    class Weights(pickle.Pickler):
        def persistent_id(self, value):
            if value == 'here':
                return 'storage', torch.FloatStorage, '0', 'cpu', count

    file = io.BytesIO()

    class Rebuilt:
        def __reduce__(self):
            size = (count,), (1,), False, None
            return torch._utils._rebuild_tensor_v2, ('here', 0, *size)

    Weights(file, 2).dump(dict(w=Rebuilt()))
    return file.getvalue()
