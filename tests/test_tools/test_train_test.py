"""tools/train.py and tools/test.py, run as they are."""

import itertools
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from helpers import deploy
from mmengine.config import Config

from mmdbb.mm.engine.command import run_command

NUMBERS = itertools.count()
ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['mmdbb.backbones'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[128] * 3, std=[64] * 3, num_classes=2),
    backbone=dict(
        type='mmpretrain.ResNetDBB', depth=18, stem_channels=4,
        base_channels=4),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=2, in_channels=32,
        loss=dict(type='CrossEntropyLoss'), topk=(1, )))
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset', data_root='{root}/images',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
val_dataloader = train_dataloader
test_dataloader = train_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.02, momentum=0.9))
auto_scale_lr = dict(base_batch_size=8)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two classes of images, dark and bright, and a config to train on."""
    root = tmp_path_factory.mktemp('tools')
    rng = np.random.default_rng(0)
    for name, low in (('dark', 0), ('bright', 128)):
        for i in range(4):
            image = rng.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
            mmcv.imwrite(image, str(root / 'images' / name / f'{i}.png'))
    (root / 'config.py').write_text(CONFIG.replace('{root}', str(root)))
    return root


def tool(name, *arguments):
    """Run a tool in this process."""
    if '--work-dir' in arguments:
        # mmengine shares the logger of runs that start in the same second.
        unique = f'experiment_name=run{next(NUMBERS)}'
        arguments = (*arguments, '--cfg-options', unique)
    argv, sys.argv = sys.argv, [f'{name}.py', *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / f'tools/{name}.py'), run_name='__main__')
    finally:
        sys.argv = argv


@pytest.fixture(scope='module')
def trained(folder):
    """A work folder after one epoch, its validation included."""
    work_dir = folder / 'work'
    tool('train', folder / 'config.py', '--work-dir', work_dir)
    assert (work_dir / 'epoch_1.pth').is_file()
    return work_dir


def test_blocks_are_said_before_the_training(folder, trained):
    text = logs(trained)
    said = text.index('16 blocks of mmdbb: backbone 16')
    assert said < text.index('Epoch(train)')


def test_no_block_is_refused_before_the_data_are_read(folder, capsys):
    with pytest.raises(SystemExit) as error:
        tool(
            'train',
            folder / 'config.py',
            '--work-dir',
            folder / 'none',
            '--cfg-options',
            'model.backbone.block.type=DBB',
            'model.backbone.block.min_kernel_size=6',
            # Without folders of classes the data set cannot be built.
            f'train_dataloader.dataset.data_root={folder / "images/dark"}',
        )
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        'train.py: the network has no block: block is set in backbone, but '
        'ResNetDBB has no convolution of 6 to 6 taps'
    )


def logs(work_dir):
    return '\n'.join(path.read_text() for path in work_dir.rglob('*.log'))


def test_train_validates(trained):
    assert 'accuracy/top1' in logs(trained)


def test_resume_auto(folder, trained):
    tool(
        'train',
        folder / 'config.py',
        '--work-dir',
        trained,
        '--resume',
        '--cfg-options',
        'train_cfg.max_epochs=2',
    )
    assert (trained / 'epoch_2.pth').is_file()
    assert 'resumed epoch: 1, iter: 2' in logs(trained)


def test_a_work_folder_goes_on_by_the_config_in_it(folder, tmp_path):
    """mmengine wrote it there; it is read, and stays."""
    more = '--work-dir', tmp_path
    tool('train', folder / 'config.py', *more)
    config = tmp_path / 'config.py'
    before = config.read_bytes()
    tool('test', config, tmp_path / 'epoch_1.pth', *more)
    tool('train', config, *more, '--resume')
    assert config.read_bytes() == before
    assert len(list(tmp_path.glob('*.py'))) > 1


def test_resume_from_a_path(folder, trained, tmp_path):
    tool(
        'train',
        folder / 'config.py',
        '--work-dir',
        tmp_path,
        '--resume',
        trained / 'epoch_1.pth',
        '--no-validate',
        '--auto-scale-lr',
        '--cfg-options',
        'train_cfg.max_epochs=2',
    )
    text = logs(tmp_path)
    assert 'resumed epoch: 1, iter: 2' in text
    assert 'accuracy/top1' not in text
    assert 'Scaling the original LR by 0.5' in text


def test_a_first_start_resumes_nothing_and_loads_weights(
    folder, trained, tmp_path
):
    tool(
        'train',
        folder / 'config.py',
        '--work-dir',
        tmp_path,
        '--resume',
        '--no-validate',
        '--cfg-options',
        f'load_from={trained / "epoch_1.pth"}',
    )
    text = logs(tmp_path)
    assert f'Load checkpoint from {trained / "epoch_1.pth"}' in text
    assert 'resumed epoch' not in text


def test_a_training_cannot_resume_from_a_merged_file(
    folder, trained, tmp_path, capfd
):
    merged = tmp_path / 'merged.pth'
    cfg = Config.fromfile(folder / 'config.py')
    deploy(cfg, str(trained / 'epoch_1.pth'), str(merged))
    with pytest.raises(SystemExit) as end:
        tool(
            'train',
            folder / 'config.py',
            '--work-dir',
            tmp_path / 'work',
            '--resume',
            merged,
        )
    assert end.value.code == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert str(merged) in line and 'weights and no state' in line


@pytest.mark.parametrize('by_rule', [True, False])
def test_a_training_starts_from_a_merged_file(
    folder, trained, tmp_path, by_rule
):
    merged = tmp_path / 'merged.pth'
    rule = (
        'model.backbone.init_cfg.type=PlainPretrained',
        f'model.backbone.init_cfg.checkpoint={merged}',
        'model.backbone.init_cfg.prefix=backbone.',
    )
    cfg = Config.fromfile(folder / 'config.py')
    deploy(cfg, str(trained / 'epoch_1.pth'), str(merged))
    tool(
        'train',
        folder / 'config.py',
        '--work-dir',
        tmp_path / 'work',
        '--no-validate',
        '--cfg-options',
        f'load_from={merged}',
        'optim_wrapper.optimizer.lr=0.0',
        *(rule if by_rule else ()),
    )
    found = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    head = 'head.fc.weight'
    expected = torch.load(merged, weights_only=False)['state_dict'][head]
    assert torch.equal(found['state_dict'][head], expected)


def test_test_writes_predictions_and_images(folder, trained, tmp_path):
    tool(
        'test',
        folder / 'config.py',
        trained / 'epoch_1.pth',
        '--work-dir',
        tmp_path,
        '--out',
        tmp_path / 'predictions.pkl',
        '--show-dir',
        tmp_path / 'drawn',
    )
    assert 'accuracy/top1' in logs(tmp_path)
    predictions = pickle.loads((tmp_path / 'predictions.pkl').read_bytes())
    assert len(predictions) == 8
    assert list((tmp_path / 'drawn').iterdir())


def test_test_augments(folder, trained, tmp_path):
    tool(
        'test',
        folder / 'config.py',
        trained / 'epoch_1.pth',
        '--work-dir',
        tmp_path,
        '--tta',
    )
    text = logs(tmp_path)
    assert 'accuracy/top1' in text and 'AverageClsScoreTTA' in text


def test_work_dir_is_named_after_the_config(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tool('train', folder / 'config.py', '--no-validate')
    assert (tmp_path / 'work_dirs/config/epoch_1.pth').is_file()


#: Makes the run's name its own.
OWN = ('--work-dir', 'work')
MISTAKES = {
    'no arguments': ('train', [], 'required: config'),
    'no config': ('train', ['none.py'], 'no such config: none.py'),
    'broken config': ('train', ['broken.py'], 'cannot read config broken.py'),
    'unknown base': ('train', ['base.py'], 'cannot read config base.py'),
    'unknown import': ('train', ['imports.py'], 'import no_such_module'),
    'no value': ('train', ['config.py', '--cfg-options', 'lr'], "got 'lr'"),
    'no key': ('train', ['config.py', '--cfg-options', '=1'], "got '=1'"),
    'key through a text': (
        'train',
        ['config.py', '--cfg-options', 'model.type.depth=3'],
        '--cfg-options do not fit config.py',
    ),
    'no such resume': (
        'train',
        ['config.py', '--resume', 'none.pth'],
        'no such checkpoint to resume from: none.pth',
    ),
    'no such start': (
        'train',
        ['config.py', '--cfg-options', 'load_from=none.pth'],
        'no such checkpoint to start from: none.pth',
    ),
    'no batch size to scale by': (
        'train',
        ['plain.py', '--auto-scale-lr'],
        '--auto-scale-lr needs auto_scale_lr.base_batch_size',
    ),
    'no data': (
        'train',
        [
            'config.py',
            '--cfg-options',
            'train_dataloader.dataset.data_root=nowhere',
        ],
        'nowhere',
    ),
    'unknown argument': ('train', ['config.py', '--resum-e'], '--resum-e'),
    'unknown key of the loop': (
        'train',
        ['config.py', *OWN, '--cfg-options', 'train_cfg.max_epoch=1'],
        'TypeError: EpochBasedTrainLoop.__init__() got an unexpected keyword '
        "argument 'max_epoch' (MMDBB_TRACEBACK=1 shows where)",
    ),
    'unknown depth': (
        'train',
        ['config.py', *OWN, '--cfg-options', 'model.backbone.depth=17'],
        'cannot build what the config says: ValueError: depth must be one of',
    ),
    'no images in a batch': (
        'train',
        [
            'config.py',
            *OWN,
            '--cfg-options',
            'train_dataloader.batch_size=0',
        ],
        'cannot build what the config says: ValueError: batch_size should be',
    ),
    'a file in the place of the work folder': (
        'train',
        ['config.py', '--work-dir', 'plain.py'],
        'cannot write to plain.py: File exists; choose another --work-dir',
    ),
    'weights of another network': (
        'test',
        ['config.py', 'other.pth', *OWN],
        'other.pth does not fit the network of the config; missing: backbone.',
    ),
    'no checkpoint': (
        'test',
        ['config.py', 'none.pth'],
        'no such checkpoint: none.pth',
    ),
    'unknown output': (
        'test',
        ['config.py', 'config.py', '--out', 'x.json'],
        '--out takes a file that ends in .pkl',
    ),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistake_takes_one_line(case, folder, monkeypatch, tmp_path, capfd):
    name, arguments, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    text = (folder / 'config.py').read_text()
    for file, content in {
        'config.py': text,
        'plain.py': text.replace('auto_scale_lr', 'something_else'),
        'broken.py': 'model = dict(',
        'base.py': "_base_ = 'mmpretrain::no/such_config.py'",
        'imports.py': "custom_imports = dict(imports=['no_such_module'])",
    }.items():
        Path(file).write_text(content)
    if 'other.pth' in arguments:
        torch.save(dict(state_dict=dict(neck=torch.ones(2))), 'other.pth')
    with pytest.raises(SystemExit) as end:
        tool(name, *arguments)
    assert end.value.code == 2
    error = capfd.readouterr().err
    line = error.strip().splitlines()[-1]
    assert line.startswith(f'{name}.py: ') and message in line
    assert 'Traceback' not in error
    assert not list(Path('.').glob('**/epoch_*.pth'))


def test_bug_keeps_its_traceback(folder):
    # Something fails deep inside a host package.
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        tool(
            'train',
            folder / 'config.py',
            '--work-dir',
            folder / 'bug',
            '--cfg-options',
            'model.head.in_channels=17',
        )


@pytest.mark.parametrize(
    'error',
    [FileNotFoundError('a.pth can not be found.'), OSError(13, 'no', 'a.pth')],
)
def test_a_refused_file_is_no_bug(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    assert 'a.pth' in capsys.readouterr().err


@pytest.mark.parametrize(
    'error',
    [OSError('broken'), SyntaxError('bad', ('ours.py', 1, 1, 'x ='))],
)
def test_other_errors_are_bugs(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_command(main)


def test_command_ends_with_code_2(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / 'tools/train.py'), 'none.py'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1] == (
        'train.py: no such config: none.py'
    )


@pytest.mark.parametrize(
    'script', sorted(path.name for path in (ROOT / 'tools').glob('*.sh'))
)
def test_launch_script_names_its_arguments(script):
    run = subprocess.run(
        [str(ROOT / 'tools' / script)], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.startswith('usage: ') and 'CONFIG' in run.stderr


def test_dist_train_starts_torchs_launcher(tmp_path):
    # A config that is missing needs no GPU: both processes say so.
    run = subprocess.run(
        [str(ROOT / 'tools/dist_train.sh'), 'none.py', '2'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            'PYTHON': sys.executable,
            'PORT': '29533',
            'PATH': '/usr/bin:/bin',
        },
    )
    assert run.returncode == 1
    assert run.stderr.count('train.py: no such config: none.py') == 2
