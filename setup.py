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
#: What serves the work on mmdbb itself, and needs a checkout.
WORKSHOP = (
    'tools/workshop',
    'tools/benchmark.py',
    'tools/demo.py',
    'tools/model_zoo.py',
    'tools/prepare_demo_data.py',
    'tools/study.py',
)


def run(path):
    """The names that a file of the package defines, which is not imported."""
    return runpy.run_path(str(ROOT / path))


HOSTS = run('mmdbb/mm/hosts.py')['HOSTS'].values()

# Ranges of what should work together, for whoever adds mmdbb to an
# environment of their own; requirements/*.txt pins the single combination
# that the tests run on. mmcv must fit the torch that is already there: install
# torch first, then `mim install mmcv` or `pip install --no-build-isolation`.
EXTRAS = {
    'openmmlab': [
        *(str(host.openmmlab) for host in HOSTS),
        'ftfy',  # mmsegmentation imports both without requiring them
        'regex',
        'setuptools<81',  # mmengine 0.10 reads pkg_resources at run time
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
            inside = file.relative_to(ROOT).as_posix()
            if inside.startswith(WORKSHOP) or '__pycache__' in file.parts:
                continue
            if file.is_file():
                out = target / file.relative_to(source)
                self.mkpath(str(out.parent))
                self.copy_file(str(file), str(out))


def readme():
    """Return the text that a package index shows."""
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
    # The folder is named for the sake of editable installations: setuptools
    # then puts it on the path, where the package is found even from the
    # folder above a checkout that is called mmdbb too.
    package_dir={'': '.'},
    packages=find_packages(include=['mmdbb', 'mmdbb.*']),
    # All else is an extra: two stacks provide the same imports, and
    # mmdbb/mm/hosts.py says what is missing where something is.
    install_requires=['torch>=2.1', 'numpy'],
    extras_require=EXTRAS,
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
