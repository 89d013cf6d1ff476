"""Installation of mmdbb.

The configs and tools ship inside the package as `mmdbb/.mim`, where mim looks
for them: copied into a wheel, linked in an editable installation.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ('configs', 'tools', 'model-index.yml')

# Ranges of what should work together, for whoever adds mmdbb to an
# environment of their own; requirements/*.txt pins the single combination
# that the tests run on. mmcv must fit the torch that is already there: install
# torch first, then `mim install mmcv` or `pip install --no-build-isolation`.
EXTRAS = {
    'openmmlab': [
        'mmengine>=0.10.0,<1.0',
        'mmcv>=2.0.0,<2.2',  # mmdet 3.3 and mmsegmentation 1.2 refuse 2.2
        'mmpretrain>=1.2.0,<2.0',
        'mmdet>=3.2.0,<4.0',
        'mmsegmentation>=1.2.0,<2.0',
        'ftfy',  # mmsegmentation imports both without requiring them
        'regex',
        'setuptools<81',  # mmengine 0.10 reads pkg_resources at run time
    ],
    'onedl': [
        'onedl-mmengine>=0.10.12,<1.0',
        'onedl-mmcv>=2.3.6,<3.0',
        'onedl-mmpretrain>=1.3.6,<2.0',
        'onedl-mmdetection>=3.5.1,<4.0',
        'onedl-mmsegmentation>=1.4.2,<2.0',
        'ftfy',
        'regex',
    ],
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
    """`build_py` that also puts configs and tools under `mmdbb/.mim`."""

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
            if file.is_file() and '__pycache__' not in file.parts:
                out = target / file.relative_to(source)
                self.mkpath(str(out.parent))
                self.copy_file(str(file), str(out))


def version():
    """Read the version without importing the package and its hosts."""
    return runpy.run_path(str(ROOT / 'mmdbb/version.py'))['__version__']


def readme():
    """Return the text that a package index shows."""
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


setup(
    name='mmdbb',
    version=version(),
    description='Structural re-parameterization (Diverse Branch Block and '
    'its relatives) for the OpenMMLab family',
    long_description=readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    packages=find_packages(include=['mmdbb', 'mmdbb.*']),
    # The hosts are extras, because two stacks provide the same imports;
    # mmdbb/mm/hosts.py says what is missing where something is.
    install_requires=['torch>=2.1', 'numpy', 'packaging'],
    extras_require=EXTRAS,
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
