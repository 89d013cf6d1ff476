"""The notebooks run, and their outputs are of the code that they show.

The cells run here in their order in one namespace, with fewer images and
epochs: the cell of the constants says how many in its metadata.
"""

import json
import re
from pathlib import Path

import pytest
from test_docs import ELSEWHERE, LINK, anchors_of
from workshop.notebooks import code_hash

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))
EACH = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
MOST = 300 * 1024  # bytes


def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


def cells_of(path, kind):
    for number, cell in enumerate(read(path)['cells']):
        if cell['cell_type'] == kind:
            yield number, ''.join(cell['source']), cell


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ['openmmlab', 'plain_pytorch']
    assert not ELSEWHERE.get('notebooks')


@EACH
@pytest.mark.usefixtures('quiet')
def test_cells_run(path, tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip('matplotlib')
    pytest.importorskip('mlxtend')
    pytest.importorskip('onnxruntime')
    matplotlib.use('Agg')
    monkeypatch.chdir(tmp_path)
    namespace = {'__name__': path.stem}
    shortened = {}
    for number, source, cell in cells_of(path, 'code'):
        exec(compile(source, f'{path.name}:{number}', 'exec'), namespace)
        shortened.update(cell['metadata'].get('short', {}))
        namespace.update(cell['metadata'].get('short', {}))
    matplotlib.pyplot.close('all')
    assert shortened['EPOCHS'] == 1
    said = capsys.readouterr().out
    assert 'accuracy' in said or '%' in said
    (page,) = tmp_path.rglob('*.html')
    assert '✓ proven' in page.read_text(encoding='utf-8')


@EACH
def test_outputs_are_of_this_code(path):
    notebook = read(path)
    assert notebook['metadata']['outputs_of'] == code_hash(notebook), (
        f'the outputs of {path.name} are of other code: make notebooks'
    )
    counts = [cell['execution_count'] for _, _, cell in cells_of(path, 'code')]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [
        o for _, _, cell in cells_of(path, 'code') for o in cell['outputs']
    ]
    assert any(o['output_type'] == 'stream' for o in outputs)
    assert any('image/png' in o.get('data', {}) for o in outputs)
    assert not any(o['output_type'] == 'error' for o in outputs)


@EACH
def test_the_hash_is_of_the_code(path):
    notebook = read(path)
    before = code_hash(notebook)
    notebook['cells'][0]['source'] = ['other words']
    assert code_hash(notebook) == before
    code = next(c for c in notebook['cells'] if c['cell_type'] == 'code')
    code['source'] = [*code['source'], '\nprint(1)']
    assert code_hash(notebook) != before


@EACH
def test_it_is_small_and_tells_nothing_of_the_machine(path):
    text = path.read_text(encoding='utf-8')
    assert path.stat().st_size < MOST
    for secret in ('/root/', '/home/', '/tmp/', '/work/', 'Traceback'):
        assert secret not in text, secret


@EACH
def test_links_lead_somewhere(path):
    for _, text, _ in cells_of(path, 'markdown'):
        for link in LINK.findall(text):
            if '://' in link:
                continue
            file, _, anchor = link.partition('#')
            target = (path.parent / file).resolve()
            assert target.exists(), link
            if anchor:
                assert anchor in anchors_of(target), link


def test_the_docs_link_to_them():
    pages = ' '.join(p.read_text() for p in (ROOT / 'docs').glob('*.md'))
    for path in NOTEBOOKS:
        assert re.search(rf'\(notebooks/{path.stem}\.ipynb\)', pages), path
