"""Where the system has no `fcntl`, as on Windows, files are written too."""

import subprocess
import sys

CODE = """
import os, sys
sys.modules['fcntl'] = None  # importing it raises ImportError
from mmdbb.files.atomic import NO_LOCKS, all_or_nothing, _locked
assert _locked('.') == NO_LOCKS
def link(*args, **kwargs):
    raise NotImplementedError
os.link = link
for text in ('one', 'two'):
    with all_or_nothing('a', 'b', overwrite=True) as drafts:
        for draft in drafts:
            open(draft, 'w').write(text)
    assert open('a').read() == open('b').read() == text
print(sorted(os.listdir('.')))
"""


def test_files_are_written_without_locks(tmp_path):
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', CODE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['a', 'b']\n"
