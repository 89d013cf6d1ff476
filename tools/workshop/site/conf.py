# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Sphinx' settings; tools/build_docs.py calls it."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

project = 'mmdbb'
author = 'mmdbb authors'
copyright = 'mmdbb authors, Apache License 2.0'
version = runpy.run_path(str(ROOT / 'mmdbb/version.py'))['__version__']
release = version

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
]
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4
# Pages in the other language belong to another build: addresses, not pages.
myst_url_schemes = {
    'http': None,
    'https': None,
    'mailto': None,
    'other': {'url': '{{path}}#{{fragment}}'},
}
# Marks of the docs' tests, such as ```python config, are no languages.
suppress_warnings = ['ref.python']

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_default_options = {'show-inheritance': True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_include_init_with_doc = False

html_theme = 'furo'
html_title = f'mmdbb {version}'
html_copy_source = False
copybutton_exclude = '.linenos, .gp'


def setup(app):
    """Leave out the fields of NamedTuples, which `Attributes` describes."""

    def skip(app, what, name, value, skipped, options):
        return True if type(value).__name__ == '_tuplegetter' else None

    app.connect('autodoc-skip-member', skip)
