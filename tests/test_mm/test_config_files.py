"""What a config's file imports."""

import pytest

from mmdbb.mm.config_files import imports_of


@pytest.mark.parametrize(
    ('text', 'modules'),
    [
        ('model = dict()', []),
        ("custom_imports = dict(imports='mine')", ['mine']),
        (
            "custom_imports = dict(imports=['mine', 'no.such.module'], "
            'allow_failed_imports=False)',
            ['mine', 'no.such.module'],
        ),
    ],
)
def test_imports_are_listed_and_not_done(tmp_path, text, modules):
    path = tmp_path / 'config.py'
    path.write_text(f'{text}\n')
    assert imports_of(str(path)) == modules
