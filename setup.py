"""Installation of mmdbb.

The configs and tools ship inside the package as `mmdbb/.mim`, because mim
looks for them there. A wheel holds copies, an editable installation links.
"""

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
    'tools/demo.py',
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


def readme():
    """Return the long description for the package index."""
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


setup(
    name='mmdbb',
    version=run('mmdbb/version.py')['__version__'],
    description='Structural re-parameterization (Diverse Branch Block and '
    'its relatives) for the OpenMMLab family',
    long_description=readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    # For editable installations: with package_dir setuptools puts the
    # checkout on the path. Without it, `import mmdbb` from the folder above a
    # checkout named mmdbb would find the checkout, not the package in it.
    package_dir={'': '.'},
    packages=find_packages(include=['mmdbb', 'mmdbb.*']),
    # OpenMMLab's packages are extras, because two stacks provide the same
    # imports; mmdbb/mm/hosts.py says which are missing.
    install_requires=['torch>=2.1', 'numpy'],
    extras_require=EXTRAS,
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
