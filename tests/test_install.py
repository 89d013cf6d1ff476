"""The installer: which environment it takes, and what it shows meanwhile."""

import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
progress = runpy.run_path(str(ROOT / 'requirements' / 'progress.py'))
State, run = progress['State'], progress['run']


def lines_of(state, *lines):
    shown = []
    for now, line in enumerate(lines):
        state.read(line, float(now))
        shown.append(state.line(float(now)))
    return shown


def test_what_pip_collects_and_downloads(tmp_path):
    part = tmp_path / 'pip-unpack-x' / 'torch-2.12.1-cp311-x86_64.whl'
    part.parent.mkdir()
    part.write_bytes(bytes(2_000_000))
    assert lines_of(
        State(str(tmp_path)),
        'Collecting torch==2.12.1 (from -r base.txt (line 11))\n',
        f'  Downloading https://x.invalid/whl/{part.name}#sha256=1 (8.0 MB)\n',
        'Collecting numpy\n',
        '  Downloading https://x.invalid/mmcv-2.1.0.tar.gz (471 kB)\n',
        '  Running command python setup.py egg_info\n',
        'Building wheels for collected packages: mmcv\n',
    ) == [
        'looking for torch',
        'downloading torch-2.12.1: 2 of 8 MB',
        'looking for numpy',
        'downloading mmcv-2.1.0.tar.gz: 0 of 471 kB',
        'preparing to build',
        'building mmcv',
    ]


def test_packages_in_place_are_counted(tmp_path):
    (tmp_path / 'wheel-1.dist-info').mkdir()
    state = State(site=str(tmp_path))
    state.read('Installing collected packages: a, b, c\n', 0)
    assert state.line(1) == 'unpacking packages: 0 of 3'
    (tmp_path / 'a-1.dist-info').mkdir()
    assert state.line(2) == 'unpacking packages: 1 of 3'


def test_compiled_files_are_counted():
    state = State()
    state.read('  [1/100] c++ -c a.cpp\n', 0.0)
    assert state.line(0.0) == 'compiling: file 1 of 100'
    state.read('  [11/100] c++ -c b.cpp\n', 30.0)
    assert state.line(30.0) == 'compiling: file 11 of 100, about 4:27 left'
    state.read('  [100/100] c++ -shared\n', 300.0)
    assert state.line(300.0) == 'compiling: file 100 of 100'


@pytest.mark.parametrize(('code', 'how'), [(0, 'done'), (3, 'failed')])
def test_a_command_ends_as_it_ends(tmp_path, code, how):
    said, log = io.StringIO(), tmp_path / 'log'
    source = f"print('word'); raise SystemExit({code})"
    command = [sys.executable, '-c', source]
    assert run(command, '[1/2] x', State(), str(log), said) == code
    assert re.search(
        rf'^\[1/2\] x: {how} \(\d+:\d\d\)$', said.getvalue(), re.M
    )
    assert 'word' in log.read_text()
    assert ('word' in said.getvalue()) == bool(code)
    assert (str(log) in said.getvalue()) == bool(code)


@pytest.mark.parametrize(
    ('arguments', 'allowed'),
    [
        (['lite'], 'openmmlab, onedl, light, torch'),
        (['light', 'yolov5'], 'docs hosts'),
    ],
)
def test_others_are_refused_at_once(arguments, allowed):
    script = ROOT / 'requirements' / 'install.sh'
    done = subprocess.run(
        ['bash', script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert arguments[-1] in line and allowed in line


def test_light_stack_compiles_nothing_and_has_the_same_versions():
    """What it lacks is what mmcv-lite cannot serve."""

    def pins(name):
        text = (ROOT / 'requirements' / f'{name}.txt').read_text()
        return {
            tuple(line.split('=='))
            for line in text.splitlines()
            if '==' in line
        }

    light, full = pins('light'), pins('openmmlab')
    (mmcv,) = pins('mmcv-openmmlab')
    assert light - full == {('mmcv-lite', mmcv[1])}
    assert {name for name, _ in full - light} == {'mmdet', 'mmsegmentation'}
