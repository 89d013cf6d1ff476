"""Arguments that no tool can use, refused before any work."""

import subprocess
from pathlib import Path

import pytest
from helpers import run_tool

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
FILES = ('config.py', 'in.pth', 'out.pth')
ONE = 'must be a whole number from 1 on'
ZERO = 'must be a finite number from 0 on'
SEED = 'must be a whole number from 0 to 2**32 - 1'


NUMBERS = [
    *(
        (name, files, ('--image-size', *size), ONE)
        for name, files in (
            ('reparam', FILES),
            ('quantize', FILES),
            ('prune', FILES),
            ('benchmark', ()),
        )
        for size in ((-1, 32), (32, 0))
    ),
    *(
        (name, FILES, (option, number), ZERO)
        for name, option in (
            ('reparam', '--tolerance'),
            ('quantize', '--max-drop'),
            ('quantize', '--budget'),
            ('prune', '--lr-scale'),
        )
        for number in ('-1', 'nan', 'inf', 'much')
    ),
    ('test', FILES[:2], ('--wait-time', '-1'), ZERO),
    ('test', FILES[:2], ('--interval', '0'), ONE),
    ('quantize', FILES, ('--calib', '0'), ONE),
    ('quantize', FILES, ('--sensitivity-images', '0'), ONE),
    ('prune', FILES, ('--calib', '0'), ONE),
    ('prune', FILES, ('--round-to', '0'), ONE),
    *(
        ('study', ('--out', 'out.json'), (option, '0'), ONE)
        for option in ('--seeds', '--sizes', '--epochs', '--batch')
    ),
    ('prepare_demo_data', (), ('--train', '0'), ONE),
    ('prepare_demo_data', (), ('--val', '0'), ONE),
    *(
        (name, files, ('--seed', number), SEED)
        for name, files in (
            ('demo', ()),
            ('prepare_demo_data', ()),
            ('prune', FILES),
            ('quantize', FILES),
        )
        for number in ('-1', 2**32, '1.5')
    ),
]


@pytest.mark.parametrize('name, files, option, message', NUMBERS)
def test_numbers(name, files, option, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_tool(name, *files, *option) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'{name}.py: argument {option[0]}: {message}, got')
    assert not list(tmp_path.iterdir())


PICTURES = [
    ('range_report', 2 * (TOOLS / 'train.py',)),  # files that exist
    ('study', ('--out', 'new.json')),
    ('benchmark', ()),
]


@pytest.mark.parametrize('name, files', PICTURES)
def test_pictures(name, files, tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.chdir(tmp_path)
    for plot, message in {
        'old.svg': 'output exists: old.svg; choose another name or pass --f',
        'new.foo': 'cannot draw new.foo: the name of a picture must end in o',
        'new': 'cannot draw new: the name of a picture must end in one of ',
        'old.svg/new.svg': 'cannot write to ',
    }.items():
        Path('old.svg').write_text('mine')
        assert run_tool(name, *files, '--plot', plot) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f'{name}.py: {message}')
        assert [p.name for p in tmp_path.iterdir()] == ['old.svg']
        assert Path('old.svg').read_text() == 'mine'


def test_rows_of_the_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('old.json').write_text('mine')
    for out, message in {
        'old.json': 'output exists: old.json; choose another name or pass --f',
        'old.json/new.json': 'cannot write to ',
    }.items():
        assert run_tool('benchmark', '--out', out) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f'benchmark.py: {message}')
    assert Path('old.json').read_text() == 'mine'


@pytest.mark.parametrize('number', ['0', '-1', 'two', '1.5'])
@pytest.mark.parametrize(
    'script, variable',
    [
        ('dist_train', None),
        ('dist_test', None),
        ('slurm_train', 'GPUS'),
        ('slurm_test', 'GPUS_PER_NODE'),
        ('slurm_test', 'CPUS_PER_TASK'),
    ],
)
def test_numbers_of_gpus(script, variable, number):
    path = str(TOOLS / f'{script}.sh')
    files = FILES[:1] if script.endswith('train') else FILES[:2]
    command = [path, 'partition', 'job', *files]
    env = {'PYTHON': 'false', 'PATH': '/usr/bin:/bin'}
    if variable is None:
        command = [path, *files, number]
    else:
        env[variable] = number
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 2
    name = variable or 'GPUS_PER_MACHINE'
    assert run.stderr == f'{path}: {name} {ONE}, got {number!r}\n'
