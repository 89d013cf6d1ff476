# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What tools measure and print."""

import io
from pathlib import Path

import pytest

from mmdbb.errors import UserError
from mmdbb.mm.engine.measure import check_picture, print_table, report_files

NAMES = [f'backbone.layer{i}.0.a_long_name.conv1' for i in (1, 2)]
SHARES = 'kxk 80, 1x1 10, 1x1_kxk 8, 1x1_avg 2'


class Screen(io.StringIO):
    """A stdout that is a terminal, or is none."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize('terminal', [False, True])
def test_tables_lose_nothing(terminal, monkeypatch):
    for name, value in dict(COLUMNS='80', TERM='dumb', NO_COLOR='1').items():
        monkeypatch.setenv(name, value)
    screen = Screen(terminal)
    monkeypatch.setattr('sys.stdout', screen)
    header = ('layer', *(f'figure {i} (%)' for i in range(5)), 'from (%)')
    rows = [(name, *'12345', SHARES) for name in NAMES]
    print_table(header, rows, 'What it means.', 'What it is')
    lines = screen.getvalue().splitlines()
    text = '\n'.join(lines)
    assert 'What it is' in text and 'What it means.' in text
    assert '…' not in text
    if terminal:
        assert max(map(len, lines)) <= 80
        cells = [line.split('│')[1].strip() for line in lines if '│' in line]
        assert ''.join(cells) == ''.join(NAMES)
    else:
        for name in NAMES:
            (line,) = (line for line in lines if name in line)
            assert SHARES in line
        (line,) = (line for line in lines if 'layer ' in line)
        assert all(title in line for title in header)


def test_files_that_were_not_asked_for(tmp_path):
    with report_files(None, None) as drafts:
        assert drafts == [None, None]
    path = tmp_path / 'a.json'
    with report_files(None, str(path), None) as drafts:
        assert drafts[::2] == [None, None]
        Path(drafts[1]).write_text('text')
        assert not path.exists()
    assert path.read_text() == 'text'
    with pytest.raises(UserError, match='output exists'):
        with report_files(None, str(path)):
            pytest.fail('began to work')


def test_formats_of_pictures():
    pytest.importorskip('matplotlib')
    for path in (None, 'a.png', 'a.b/c.SVG'):
        check_picture(path)
    for path in ('a.foo', 'a', 'a.png/b', '.png'):
        with pytest.raises(UserError, match=f'cannot draw {path}: .*, .svg'):
            check_picture(path)
