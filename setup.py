"""Installation of mmdbb.

The configs and tools ship inside the package as `mmdbb/.mim`, because mim
looks for them there. A wheel holds copies, an editable installation links.
"""

import os
import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ('configs', 'tools', 'model-index.yml')
#: Tools for work on mmdbb itself, which need a checkout and are not shipped.
WORKSHOP = (
    'tools/workshop',
    'tools/benchmark.py',
    'tools/build_docs.py',
    'tools/build_release.py',
    'tools/demo.py',
    'tools/demo_torch.py',
    'tools/model_zoo.py',
    'tools/prepare_demo_data.py',
    'tools/study.py',
    'tools/sweep.py',
)


def run(path):
    """Run a file of the package without importing the package.

    Importing needs torch, which may not be installed yet.

    Args:
        path: Path of the file, relative to the checkout.

    Returns:
        dict: The names that the file defines.
    """
    return runpy.run_path(str(ROOT / path))


HOSTS = run('mmdbb/mm/hosts.py')['HOSTS'].values()
VERSION = run('mmdbb/version.py')['__version__']

# Ranges of versions that should work together, for those who add mmdbb to an
# environment of their own; requirements/*.txt pins the one combination that
# the tests run on. A build of mmcv fits one version of torch only, so install
# torch first, then `mim install mmcv` or `pip install --no-build-isolation`.
EXTRAS = {
    'openmmlab': [
        *(str(host.openmmlab) for host in HOSTS),
        'ftfy',  # mmsegmentation imports ftfy and regex, but requires neither
        'regex',
        'setuptools<81',  # mmengine 0.10 imports its pkg_resources
    ],
    'onedl': [*(str(host.onedl) for host in HOSTS), 'ftfy', 'regex'],
    'demo': [
        'mlxtend>=0.23',
        'scikit-learn>=1.3',
        'matplotlib>=3.6',
        'rich>=13',
    ],
    'formats': [
        'onnx>=1.15',
        'onnxruntime>=1.17',
        'onnxscript>=0.1',
        'safetensors>=0.4',
    ],
    'quantization': [
        'onnx>=1.15',
        'onnxruntime>=1.17',
        'onnxscript>=0.1',
        'rich>=13',
    ],
    'pruning': ['torch-pruning>=1.5', 'rich>=13'],
    'tests': ['pytest>=7.4', 'hypothesis>=6.80', 'ruff>=0.5'],
}


class BuildWithMim(build_py):
    """A `build_py` that also puts configs and tools under `mmdbb/.mim`."""

    def run(self):
        super().run()
        for name in SHIPPED:
            source = ROOT / name
            if not source.exists():
                continue
            if self.editable_mode:
                self._link(source, ROOT / 'mmdbb' / '.mim' / name)
            else:
                self._copy(source, Path(self.build_lib, 'mmdbb/.mim', name))

    def _link(self, source, target):
        target.parent.mkdir(exist_ok=True)
        if target.is_symlink():
            target.unlink()
        target.symlink_to(Path('..', '..', source.name))

    def _copy(self, source, target):
        files = sorted(source.rglob('*')) if source.is_dir() else [source]
        for file in files:
            inside = file.relative_to(ROOT).as_posix()
            if inside.startswith(WORKSHOP) or '__pycache__' in file.parts:
                continue
            if file.is_file():
                out = target / file.relative_to(source)
                self.mkpath(str(out.parent))
                self.copy_file(str(file), str(out))


#: Address of the repository, which the release workflow knows. A package
#: built without it names none, and its description has no links to files.
REPOSITORY = os.environ.get('MMDBB_REPOSITORY', '').rstrip('/')
#: `[text](target)` and `![text](target)`; the text may hold a picture.
LINK = re.compile(r'(!?)\[((?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)')


def readme(repository=REPOSITORY):
    """Return the long description, in which nothing is relative.

    A package index shows README.md without the files beside it. So links and
    pictures get the repository's address, at the version's tag; without an
    address a link leaves its text, and a picture nothing.

    Args:
        repository: Address of the repository, such as
            `https://github.com/OWNER/mmdbb`.
    """
    path = ROOT / 'README.md'
    text = path.read_text(encoding='utf-8') if path.exists() else ''

    def absolute(match):
        picture, text, target = match.groups()
        text = LINK.sub(absolute, text)
        if '://' in target:
            return f'{picture}[{text}]({target})'
        if not repository:
            return '' if picture else text
        kind = 'raw' if picture else 'blob'
        where = f'{repository}/{kind}/v{VERSION}/{target}'
        return f'{picture}[{text}]({where})'

    return LINK.sub(absolute, text)


def project_urls(repository=REPOSITORY):
    """Return the links that a package index shows beside the description."""
    papers = {
        'Paper: DBB': 'https://arxiv.org/abs/2103.13425',
        'Paper: ACNet': 'https://arxiv.org/abs/1908.03930',
        'Paper: RepVGG': 'https://arxiv.org/abs/2101.03697',
        'Paper: OREPA': 'https://arxiv.org/abs/2204.00826',
    }
    if not repository:
        return papers
    return {
        'Source': repository,
        'Issues': f'{repository}/issues',
        'Changelog': f'{repository}/blob/main/docs/changelog.md',
        **papers,
    }


setup(
    name='mmdbb',
    version=VERSION,
    description='Structural re-parameterization (Diverse Branch Block and '
    'its relatives) for the OpenMMLab family',
    long_description=readme(),
    long_description_content_type='text/markdown',
    author='mmdbb authors',
    url=REPOSITORY or None,
    project_urls=project_urls(),
    license='Apache-2.0',
    keywords=[
        'structural re-parameterization',
        'Diverse Branch Block',
        'RepVGG',
        'ACNet',
        'OREPA',
        'OpenMMLab',
        'computer vision',
        'PyTorch',
    ],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        *(
            f'Programming Language :: Python :: 3.{minor}'
            for minor in range(9, 14)
        ),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Topic :: Software Development :: Libraries :: Python Modules',
        'Typing :: Typed',
    ],
    python_requires='>=3.9',
    # For editable installations: with package_dir setuptools puts the
    # checkout on the path. Without it, `import mmdbb` from the folder above a
    # checkout named mmdbb would find the checkout, not the package in it.
    package_dir={'': '.'},
    packages=find_packages(include=['mmdbb', 'mmdbb.*']),
    package_data={'mmdbb': ['py.typed']},
    # OpenMMLab's packages are extras, because two stacks provide the same
    # imports; mmdbb/mm/hosts.py says which are missing.
    install_requires=['torch>=2.1', 'numpy'],
    extras_require=EXTRAS,
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
