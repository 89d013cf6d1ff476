"""An interrupted training goes on from the newest whole checkpoint."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import run_tool
from runs import run_config, train, train_and_exit
from tiny_demo import tiny_config

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_content
from mmdbb.mm.engine.resume import newest_whole_checkpoint

pytestmark = pytest.mark.usefixtures('quiet')
HOOK = 'default_hooks.checkpoint'
#: Forks a process that has imported these, and run nothing.
CLEAN = multiprocessing.get_context('forkserver')
CLEAN.set_forkserver_preload(
    ['torch', 'mmengine.runner', 'mmpretrain', 'mmdet', 'mmseg']
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A work folder with three epochs."""
    folder = tmp_path_factory.mktemp('resume') / 'run'
    keep = {
        f'{HOOK}.max_keep_ckpts': -1,
        f'{HOOK}.type': 'WholeCheckpointHook',
    }
    train(run_config(folder, (1.0, 2.0, 3.0), **keep))
    return folder


@pytest.fixture
def work(run, tmp_path):
    """A copy of it, and its config."""
    folder = tmp_path / 'run'
    shutil.copytree(run, folder)
    pointer = folder / 'last_checkpoint'
    pointer.write_text(str(folder / 'epoch_3.pth'))
    return folder, run_config(folder, (1.0, 2.0, 3.0))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


POINTERS = {
    'missing': lambda path: path.unlink(),
    'empty': lambda path: path.write_text(''),
    'damaged': lambda path: path.write_bytes(b'\xff\xfe\x00'),
    'of nothing': lambda path: path.write_text(f'{path.parent}/epoch_9.pth'),
    'stale': lambda path: path.write_text(f'{path.parent}/epoch_1.pth'),
    'a folder': lambda path: (path.unlink(), path.mkdir()),
    'a pipe': lambda path: (path.unlink(), os.mkfifo(path)),
    'right': lambda path: None,
}


@pytest.mark.parametrize('case', POINTERS)
def test_the_pointer_is_not_trusted(work, case, capsys):
    folder, cfg = work
    POINTERS[case](folder / 'last_checkpoint')
    assert newest_whole_checkpoint(cfg) == str(folder / 'epoch_3.pth')
    said = capsys.readouterr().out
    assert f'resuming from {folder / "epoch_3.pth"}' in said
    assert ('names another' in said) is (case in ('of nothing', 'stale'))


NEWEST = {
    'cut off': cut,
    'one bit wrong': flip,
    'empty': lambda path: path.write_bytes(b''),
    'weights only': lambda path: torch.save(
        dict(state_dict=read_content(str(path))['state_dict']), path
    ),
    'a pipe': lambda path: (path.unlink(), os.mkfifo(path)),
    'a folder': lambda path: (path.unlink(), path.mkdir()),
    'a link to nowhere': lambda path: (
        path.unlink(),
        path.symlink_to('nowhere'),
    ),
    'gone': lambda path: path.unlink(),
}


@pytest.mark.parametrize('case', NEWEST)
def test_the_newest_whole_one_is_taken(work, case, capsys):
    folder, cfg = work
    NEWEST[case](folder / 'epoch_3.pth')
    assert newest_whole_checkpoint(cfg) == str(folder / 'epoch_2.pth')
    said = capsys.readouterr().out
    assert ('passed over: ' in said) is (case != 'gone')
    assert '\n\n' not in said


def test_no_whole_one_is_not_a_first_start(work):
    folder, cfg = work
    for number in (1, 2, 3):
        cut(folder / f'epoch_{number}.pth')
    with pytest.raises(UserError, match='none of the checkpoints .* is whole'):
        newest_whole_checkpoint(cfg)


def test_nothing_to_resume(tmp_path):
    assert newest_whole_checkpoint(run_config(tmp_path / 'new')) is None
    (tmp_path / 'new').mkdir()
    assert newest_whole_checkpoint(run_config(tmp_path / 'new')) is None


def test_another_folder_and_name(run, tmp_path):
    cfg = run_config(tmp_path / 'work' / 'name')
    cfg.default_hooks.checkpoint.update(
        out_dir=str(tmp_path / 'out'), filename_tmpl='saved-{}.pth'
    )
    (tmp_path / 'out' / 'name').mkdir(parents=True)
    for number in (9, 10):
        path = tmp_path / 'out' / 'name' / f'saved-{number}.pth'
        shutil.copy(run / 'epoch_2.pth', path)
    assert newest_whole_checkpoint(cfg) == str(path)


def named(run, folder, *names, pointer=None):
    """A folder with copies of checkpoints, each written after the last."""
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        shutil.copy(run / 'epoch_2.pth', folder / name)
        os.utime(folder / name, (10**9 + i, 10**9 + i))
    if pointer:
        (folder / 'last_checkpoint').write_text(str(folder / pointer))


TEMPLATES = {
    'filled with zeros': ('ep_{:03d}.pth', ['ep_009.pth', 'ep_010.pth']),
    'by number': ('{0:4d}-{0}.pth', ['   9-9.pth', '  10-10.pth']),
    'with braces': ('{{{}}}.pth', ['{10}.pth']),
    'not by time': ('ep_{}.pth', ['ep_9.pth', 'ep_8.pth', 'ep_10.pth']),
    'of another suffix': ('ep_{}.ckpt', ['ep_10.ckpt']),
    'one name': ('latest.pth', ['latest.pth']),
    'one name, other runs': ('latest.pth', ['epoch_9.pth', 'latest.pth']),
    'changed since': ('ep_{}.pth', ['epoch_9.pth', 'epoch_10.pth']),
    'counted anew': ('ep_{}.pth', ['epoch_99.pth', 'iter_9.pth', 'ep_1.pth']),
}


@pytest.mark.parametrize('case', TEMPLATES)
def test_names_of_any_template(run, tmp_path, case):
    template, names = TEMPLATES[case]
    named(run, tmp_path / 'run', *names)
    cfg = run_config(tmp_path / 'run')
    cfg.default_hooks.checkpoint.filename_tmpl = template
    if case == 'not by time':
        os.utime(tmp_path / 'run' / 'ep_8.pth')
    found = newest_whole_checkpoint(cfg)
    assert found == str(tmp_path / 'run' / names[-1])


def test_a_name_that_only_the_pointer_knows(run, tmp_path):
    cfg = run_config(tmp_path / 'run')
    named(run, tmp_path / 'run', 'ep_1.pth', 'ep_2.pth', pointer='ep_2.pth')
    found = newest_whole_checkpoint(cfg)
    assert found == str(tmp_path / 'run' / 'ep_2.pth')
    cut(tmp_path / 'run' / 'ep_2.pth')
    with pytest.raises(UserError, match='is whole: .*ep_2.pth'):
        newest_whole_checkpoint(cfg)


@pytest.mark.parametrize('pointer', [None, 'ep_3.pth'])
def test_names_that_nothing_knows_are_not_overwritten(run, tmp_path, pointer):
    cfg = run_config(tmp_path / 'run')
    named(run, tmp_path / 'run', 'ep_1.pth', 'best.pth', pointer=pointer)
    with pytest.raises(UserError, match='best.pth, ep_1.pth.*--resume PATH'):
        newest_whole_checkpoint(cfg)
    # What a first start begins from may lie there.
    (tmp_path / 'run' / 'ep_1.pth').unlink()
    cfg.load_from = str(tmp_path / 'run' / 'best.pth')
    if pointer:
        with pytest.raises(UserError, match='ep_3.pth is gone'):
            newest_whole_checkpoint(cfg)
    else:
        assert newest_whole_checkpoint(cfg) is None


def test_no_template(run, tmp_path):
    cfg = run_config(tmp_path / 'run')
    cfg.default_hooks.checkpoint.filename_tmpl = 'epoch_{.pth'
    with pytest.raises(UserError, match='filename_tmpl .*epoch_{.pth'):
        newest_whole_checkpoint(cfg)


def test_a_folder_in_the_template(run, tmp_path):
    cfg = run_config(tmp_path / 'run')
    cfg.default_hooks.checkpoint.filename_tmpl = 'parts/ep_{}.pth'
    named(run, tmp_path / 'run' / 'parts', 'ep_1.pth')
    found = newest_whole_checkpoint(cfg)
    assert found == str(tmp_path / 'run' / 'parts' / 'ep_1.pth')


@pytest.mark.parametrize('option', ['--resume', 'resume=True'])
def test_the_tool_goes_on_by_another_template(tmp_path, option, capfd):
    cfg = run_config(tmp_path / 'run', (1.0, 2.0))
    cfg.default_hooks.checkpoint.update(
        filename_tmpl='ep_{:03d}.pth', max_keep_ckpts=-1
    )
    cfg.train_cfg.max_epochs = 1
    cfg.dump(tmp_path / 'config.py')
    arguments = tmp_path / 'config.py', '--work-dir', tmp_path / 'run'
    assert run_tool('train', *arguments) == 0
    (tmp_path / 'run' / 'last_checkpoint').unlink()
    before = (tmp_path / 'run' / 'ep_001.pth').read_bytes()
    more = [option] if option == '--resume' else ['--cfg-options', option]
    if option == '--resume':
        more.append('--cfg-options')
    more += ['train_cfg.max_epochs=2', 'experiment_name=again']
    assert run_tool('train', *arguments, *more) == 0
    assert (tmp_path / 'run' / 'ep_001.pth').read_bytes() == before
    content = read_content(str(tmp_path / 'run' / 'ep_002.pth'))
    assert content['meta']['epoch'] == 2


def test_a_pipe_in_the_place_of_the_pointer(work):
    """It would stop the training where the first checkpoint is written."""
    folder, cfg = work
    POINTERS['a pipe'](folder / 'last_checkpoint')
    cfg.merge_from_dict(
        {
            f'{HOOK}.type': 'WholeCheckpointHook',
            'resume': True,
            'load_from': str(folder / 'epoch_2.pth'),
        }
    )
    with pytest.raises(UserError, match='last_checkpoint is not a file'):
        train(cfg)


def test_a_first_start_says_so(tmp_path, capsys):
    assert newest_whole_checkpoint(run_config(tmp_path / 'new')) is None
    said = capsys.readouterr().out
    assert f'nothing to resume in {tmp_path / "new"}: ' in said


def test_a_training_that_does_not_keep_its_optimizer(work, capsys):
    folder, cfg = work
    for number in (1, 2, 3):
        path = folder / f'epoch_{number}.pth'
        content = read_content(str(path))
        del content['optimizer']
        torch.save(content, path)
    with pytest.raises(UserError, match='wrong form: optimizer') as error:
        newest_whole_checkpoint(cfg)
    assert f'in {folder} is' in str(error.value)  # once
    cfg.default_hooks.checkpoint.save_optimizer = False
    assert newest_whole_checkpoint(cfg) == str(folder / 'epoch_3.pth')
    cfg.dump(folder.parent / 'config.py')
    code = run_tool(
        'train',
        folder.parent / 'config.py',
        *('--work-dir', folder, '--resume'),
        *('--cfg-options', 'train_cfg.max_epochs=4'),
        'experiment_name=without',
    )
    assert code == 0
    assert (folder / 'epoch_4.pth').is_file()


def hub(**changes):
    def change(content):
        content['message_hub'].update(changes)

    return change


@pytest.mark.parametrize(
    'change, part',
    [
        (lambda c: c['meta'].update(epoch='3'), 'meta.epoch'),
        (lambda c: c['meta'].update(iter=-1), 'meta.iter'),
        (lambda c: c.update(meta=[1]), 'meta.epoch, meta.iter'),
        (lambda c: c.update(optimizer=3), 'optimizer'),
        (lambda c: c.update(param_schedulers=3), 'param_schedulers'),
        (lambda c: c.update(message_hub=3), 'message_hub'),
        (hub(log_scalars=dict(a=3)), 'message_hub'),
        (hub(runtime_info={3: 3}), 'message_hub'),
        (hub(runtime_info=dict(keep_ckpt_ids=['../x'])), 'message_hub'),
        (lambda c: c.pop('message_hub'), 'no state of a training'),
        (lambda c: c['meta'].update(epoch=10**300), 'meta.epoch'),
        (lambda c: c['meta'].update(seed='x'), 'meta.seed'),
        (lambda c: c['meta'].update(seed=-1), 'meta.seed'),
        (lambda c: c['meta'].update(cfg=5), 'meta.cfg'),
        (lambda c: c['meta'].update(config='1 / 0'), 'run as code'),
        (lambda c: c.update(param_schedulers=[1]), 'param_schedulers'),
        (lambda c: c.update(param_schedulers=dict(a=1)), 'param_schedulers'),
        (
            lambda c: c['param_schedulers'][0].update(last_step='x'),
            'param_schedulers',
        ),
        (
            lambda c: c['param_schedulers'][0].update(base_values=['x']),
            'param_schedulers',
        ),
        (
            lambda c: c['optimizer'].update(param_groups=[]),
            'optimizer.param_groups',
        ),
        (lambda c: c['optimizer'].update(state=3), 'optimizer.state'),
        (lambda c: c['optimizer'].update(state={0: 5}), 'optimizer.state.0'),
        (lambda c: group(c).update(lr='x'), 'optimizer.param_groups.0.lr'),
        (lambda c: group(c).update(lr=10**400), 'param_groups.0.lr'),
        (lambda c: group(c).pop('params'), 'optimizer.param_groups.0'),
        (
            lambda c: c.update(optimizer=dict(a=dict(param_groups=[]))),
            'optimizer.a.param_groups',
        ),
        (
            lambda c: c['optimizer']['state'][0]['momentum_buffer'].fill_(
                float('nan')
            ),
            'not finite numbers: optimizer.state.0.momentum',
        ),
        (
            # Some bytes that claim to be a TB.
            lambda c: c['optimizer']['state'][0].update(
                momentum_buffer=torch.zeros(1).expand(1 << 40)
            ),
            'optimizer.state.0.momentum_buffer',
        ),
        (
            lambda c: c['optimizer']['state'][0].update(
                momentum_buffer=torch.zeros(3).to_sparse()
            ),
            'epoch_3.pth',
        ),
    ],
)
def test_what_nothing_can_go_on_from(work, change, part, capsys):
    folder, cfg = work
    path = folder / 'epoch_3.pth'
    content = read_content(str(path))
    change(content)
    torch.save(content, path)
    cfg.dump(folder / 'config.py')
    assert newest_whole_checkpoint(cfg) == str(folder / 'epoch_2.pth')
    assert part in capsys.readouterr().out


def group(content):
    return content['optimizer']['param_groups'][0]


def of_another_shape(content):
    for values in content['optimizer']['state'].values():
        values['momentum_buffer'] = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    'change, part',
    [
        (of_another_shape, 'momentum_buffer of the optimizer is (1, 2, 3)'),
        (lambda c: group(c)['params'].pop(), 'ValueError: loaded state dict'),
        (
            lambda c: c.update(param_schedulers=dict(a=c['param_schedulers'])),
            'ValueError: dictionary update',
        ),
    ],
)
def test_a_state_that_does_not_fit_is_one_line(work, change, part, capfd):
    folder, cfg = work
    content = read_content(str(folder / 'epoch_2.pth'))
    change(content)
    torch.save(content, folder / 'bad.pth')
    cfg.dump(folder.parent / 'config.py')
    code = run_tool(
        'train',
        folder.parent / 'config.py',
        *('--work-dir', folder.parent / 'other'),
        *('--resume', folder / 'bad.pth'),
        *('--cfg-options', f'experiment_name=fits{len(part)}'),
    )
    error = capfd.readouterr().err
    line = error.strip().splitlines()[-1]
    assert code == 2 and f'cannot resume from {folder / "bad.pth"}: ' in line
    assert part in line and 'Traceback' not in error


def test_resume_of_a_path_is_checked_as_well(work, capfd):
    folder, cfg = work
    content = read_content(str(folder / 'epoch_3.pth'))
    content['optimizer'] = 3
    torch.save(content, folder / 'bad.pth')
    cut(folder / 'epoch_2.pth')
    cfg.dump(folder / 'config.py')
    for name, reason in (
        ('bad.pth', 'missing or of the wrong form: optimizer'),
        ('epoch_2.pth', 'is not a checkpoint, or is truncated'),
        ('run.fifo', 'is a pipe or a device, not a file'),
    ):
        if name == 'run.fifo':
            os.mkfifo(folder / name)
        code = run_tool(
            'train',
            folder / 'config.py',
            *('--work-dir', folder.parent / name),
            *('--resume', folder / name),
        )
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert code == 2 and line.startswith('train.py: ') and reason in line


# Saving


def saved(folder):
    return sorted(path.name for path in folder.glob('*.pth'))


class Stop(Exception):
    """In the place of a kill."""


def test_a_save_that_stops_loses_nothing(work, monkeypatch):
    from mmdbb.files import atomic

    folder, cfg = work
    cfg.merge_from_dict(
        {
            f'{HOOK}.type': 'WholeCheckpointHook',
            'train_cfg.max_epochs': 5,
            'resume': True,
            'load_from': str(folder / 'epoch_2.pth'),
        }
    )
    for number in (1, 3):
        (folder / f'epoch_{number}.pth').unlink()
    content = read_content(str(folder / 'epoch_2.pth'))
    content['message_hub']['runtime_info']['keep_ckpt_ids'] = [2]
    torch.save(content, folder / 'epoch_2.pth')
    move = atomic._move_all

    def stop(drafts, outputs, overwrite):
        if str(outputs[0]).endswith('epoch_3.pth'):
            raise Stop
        move(drafts, outputs, overwrite)

    monkeypatch.setattr(atomic, '_move_all', stop)
    with pytest.raises(Stop):
        train(cfg)
    assert 'epoch_2.pth' in saved(folder)
    assert newest_whole_checkpoint(cfg) == str(folder / 'epoch_2.pth')
    monkeypatch.undo()
    cfg.val_evaluator.scores = [3.0, 4.0, 5.0]
    train(cfg)
    assert [n for n in saved(folder) if n.startswith('e')] == ['epoch_5.pth']
    assert len(saved(folder)) == 2  # and the best one
    assert not list(folder.glob('.mmdbb-*'))


def test_a_checkpoint_cannot_name_what_is_removed(work, tmp_path):
    """Its best one is removed when a better comes."""
    folder, cfg = work
    precious = tmp_path / 'precious.pth'
    precious.write_text('precious')
    content = read_content(str(folder / 'epoch_2.pth'))
    content['message_hub']['runtime_info']['best_ckpt'] = str(precious)
    torch.save(content, folder / 'epoch_2.pth')
    cfg.merge_from_dict(
        {
            f'{HOOK}.type': 'WholeCheckpointHook',
            'resume': True,
            'load_from': str(folder / 'epoch_2.pth'),
        }
    )
    cfg.val_evaluator.scores = [9.0]
    train(cfg)
    assert precious.read_text() == 'precious'
    assert 'best_good_epoch_3.pth' in saved(folder)


# Bit by bit


def in_a_child(*arguments):
    """Train in another process; its exit code, below zero for a signal.

    It is no fork of this one: a process that has computed gradients with
    threads cannot be forked and compute more.
    """
    process = CLEAN.Process(target=train_and_exit, args=arguments)
    process.start()
    process.join()
    return process.exitcode


QAT = dict(type='QATHook', begin=1, freeze=3, averaging_constant=0.5)


@pytest.mark.parametrize(
    'workers, hooks', [(0, []), (1, []), (0, [QAT])], ids=str
)
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, workers, hooks):
    cfg = run_config(tmp_path / 'whole', (1.0, 2.0, 3.0, 4.0))
    cfg.train_dataloader.update(
        num_workers=workers, persistent_workers=bool(workers)
    )
    cfg.custom_imports.imports.append('mmdbb.quantize')
    cfg.custom_hooks += [*hooks, dict(type='KilledOfTests')]
    cfg.dump(tmp_path / 'config.py')
    killed = tmp_path / 'killed.py'
    cfg.custom_hooks[-1]['after'] = 5
    cfg.dump(killed)

    def run(config, name, *more):
        work_dir = tmp_path / name
        return in_a_child(
            config, '--work-dir', work_dir, '--repeatable', *more
        )

    assert run(tmp_path / 'config.py', 'whole') == 0
    assert run(killed, 'parts') == -signal.SIGKILL
    assert saved(tmp_path / 'parts') == [
        'best_good_epoch_2.pth',
        'epoch_2.pth',
    ]
    # The scores that are left.
    cfg.val_evaluator.scores = [3.0, 4.0]
    cfg.custom_hooks[-1]['after'] = None
    cfg.dump(tmp_path / 'config.py')
    assert run(tmp_path / 'config.py', 'parts', '--resume') == 0
    whole, parts = (
        read_content(str(tmp_path / name / 'epoch_4.pth'))
        for name in ('whole', 'parts')
    )
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert equal(whole[key], parts[key]), key
    quantizers = [n for n in whole['state_dict'] if '_quantizer.' in n]
    assert bool(quantizers) == bool(hooks)
    assert equal(whole['param_schedulers'], parts['param_schedulers'])


#: Task of the demo -> how its config is cut short, and the iteration in which
#: the training is killed: between two checkpoints.
SHORT = dict(
    classification=(
        {
            'train_cfg.max_epochs': 3,
            'train_cfg.val_interval': 2,
            'default_hooks.checkpoint.interval': 1,
        },
        14,
    ),
    detection=(
        {
            'train_cfg.max_epochs': 3,
            'train_cfg.val_interval': 2,
            'default_hooks.checkpoint.interval': 1,
        },
        3,
    ),
    segmentation=(
        {
            'train_cfg.max_iters': 5,
            'train_cfg.val_interval': 2,
            'default_hooks.checkpoint.interval': 2,
        },
        4,
    ),
)


@pytest.mark.parametrize('task', SHORT)
def test_a_demo_that_is_killed_and_resumed(tmp_path, task):
    """With augmentation and workers; the last one counts iterations."""
    changes, killed_in = SHORT[task]
    cfg = tiny_config(task, tmp_path)
    cfg.train_dataloader.update(num_workers=1, persistent_workers=True)
    cfg.merge_from_dict(changes)
    configs = {}
    for name, after in (('whole', None), ('killed', killed_in)):
        cfg.custom_hooks = [dict(type='KilledOfTests', after=after)]
        configs[name] = tmp_path / f'{name}.py'
        cfg.dump(configs[name])

    def run(name, folder, *more):
        work_dir = tmp_path / folder
        return in_a_child(
            configs[name], '--work-dir', work_dir, '--repeatable', *more
        )

    assert run('whole', 'whole') == 0
    assert run('killed', 'parts') == -signal.SIGKILL
    assert run('whole', 'parts', '--resume') == 0
    last = Path((tmp_path / 'whole' / 'last_checkpoint').read_text()).name
    whole, parts = (
        read_content(str(tmp_path / folder / last))
        for folder in ('whole', 'parts')
    )
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        assert equal(whole[key], parts[key]), key


def equal(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            equal(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return found == expected


def test_a_training_without_a_seed_is_not_repeatable(tmp_path, capfd):
    cfg = run_config(tmp_path / 'run')
    cfg.randomness = dict(seed=None)
    cfg.dump(tmp_path / 'config.py')
    code = run_tool(
        'train',
        tmp_path / 'config.py',
        '--work-dir',
        tmp_path / 'run',
        '--repeatable',
    )
    assert code == 2
    assert 'randomness.seed=0' in capfd.readouterr().err
