# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run the notebooks of the docs, and write their outputs into them.

  make notebooks

Each notebook runs in a folder of its own, by nbclient. Its metadata then say
which code the outputs are of: tests/test_notebooks.py refuses outputs of other
code than stands above them.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / 'docs' / 'notebooks'


def code_hash(notebook: dict) -> str:
    """The hash of a notebook's code.

    Args:
        notebook: The notebook, as JSON has it.
    """
    sources = [
        ''.join(cell['source'])
        for cell in notebook['cells']
        if cell['cell_type'] == 'code'
    ]
    text = '\n\n'.join(sources).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def run(path: Path) -> None:
    """Run a notebook, and write it with its outputs.

    Args:
        path: The notebook.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=1800, resources=dict(metadata=dict(path=folder))
        )
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop('execution', None)
        if cell.cell_type == 'code':
            cell.outputs = [o for o in cell.outputs if _says_something(o)]
    notebook.metadata['outputs_of'] = code_hash(notebook)
    notebook.metadata['language_info'] = dict(name='python')
    nbformat.write(notebook, path)
    print(f'{path.name}: {path.stat().st_size / 1024:.0f} KiB')


def _says_something(output: dict) -> bool:
    """Whether an output is of the notebook, and no warning or progress bar."""
    if output['output_type'] == 'stream':
        text = ''.join(output['text'])
        return output['name'] == 'stdout' and bool(text.strip())
    if output['output_type'] == 'display_data':
        return 'image/png' in output['data']
    # An object without words of its own, such as a generator.
    shown = ''.join(output.get('data', {}).get('text/plain', ''))
    return ' object at 0x' not in shown and 'Generator at 0x' not in shown


def main() -> None:
    """Run all notebooks, or those that are named."""
    os.environ['PYTHONWARNINGS'] = 'ignore'
    names = sys.argv[1:] or sorted(p.stem for p in FOLDER.glob('*.ipynb'))
    for name in names:
        run(FOLDER / f'{name}.ipynb')


if __name__ == '__main__':
    main()
