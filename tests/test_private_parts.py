"""The private parts of OpenMMLab's packages stand in host_internals.py."""

import ast
from pathlib import Path

import pytest

import mmdbb

ROOT = Path(mmdbb.__file__).parent
HOST_PACKAGES = ('mmpretrain', 'mmdet', 'mmseg')
#: torch's, Python's, and those of every named tuple.
NOT_OF_HOSTS = {
    '_modules',
    '_parameters',
    '_buffers',
    '_conv_forward',
    '_forward_hooks',
    '_forward_pre_hooks',
    '_pytree',
    '_exit',
    '_replace',
    '_asdict',
    '_fields',
}
#: File, private name -> why it stands there. What a host calls of these is
#: tested in test_mm/test_host_internals.py.
PRIVATE = {
    ('mm/engine/optim.py', '_validate_cfg'): "overrides mmengine's",
    ('mm/backbones/absorbed.py', '_freeze_stages'): 'where a host has it',
}
#: File, attribute -> why something of a host's is replaced outside of
#: host_internals.py.
REPLACED = {
    ('mm/backbones/absorbed.py', 'setattr'): 'a norm by nn.Identity',
}
#: Methods of the hosts' backbones that ours override or call.
OF_BACKBONES = {'_make_stage', '_freeze_stages'}
ACCESSORS = ('getattr', 'hasattr', 'setattr', 'delattr', '__setattr__')


def upper_files():
    tools = ROOT.parent / 'tools'
    for path in [*(ROOT / 'mm').rglob('*.py'), *tools.rglob('*.py')]:
        if path.name != 'host_internals.py':
            base = ROOT if ROOT in path.parents else ROOT.parent
            yield path.relative_to(base).as_posix(), path.read_text()


def is_private(name):
    return name.startswith('_') and not name.startswith('__')


def private_names(text):
    """Private attributes that a file takes from anything but its own."""
    tree = ast.parse(text)
    own = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            root = getattr(owner, 'id', None)
            itself = owner is node.value and root in ('self', 'cls', *own)
            if not itself and root not in ('torch', 'nn'):
                yield node.attr
        elif isinstance(node, ast.Call):
            name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
            if name in ACCESSORS:
                yield from (
                    arg.value
                    for arg in node.args
                    if isinstance(arg, ast.Constant)
                    and isinstance(arg.value, str)
                    and is_private(arg.value)
                )
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or '').split('.')[0]
            for alias in node.names:
                if is_private(alias.name) and top not in ('torch', 'mmdbb'):
                    yield alias.name


def inherited_names(text):
    """Private methods that a file takes from `self` and does not define."""
    tree = ast.parse(text)
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(
            node.ctx, ast.Store
        ):
            own.add(node.attr)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and getattr(node.value, 'id', None) in ('self', 'cls')
            and is_private(node.attr)
            and node.attr not in own
        ):
            yield node.attr


def replaced_names(text):
    """Attributes of others to which a file gives a function, or `setattr`."""
    tree = ast.parse(text)
    functions = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    hosts = {
        (alias.asname or alias.name).split('.')[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if (getattr(node, 'module', None) or alias.name).split('.')[0]
        in ('mmengine', 'mmcv', *HOST_PACKAGES)
    }
    for node in ast.walk(tree):
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Delete)):
            for target in targets:
                if not isinstance(target, ast.Attribute):
                    continue
                root = target.value
                while isinstance(root, ast.Attribute):
                    root = root.value
                owner = getattr(root, 'id', '')
                value = getattr(getattr(node, 'value', None), 'id', None)
                if owner not in ('self', 'PORTS', *functions) and (
                    owner in hosts
                    or value in functions
                    or isinstance(node, ast.Delete)
                ):
                    yield target.attr
        elif isinstance(node, ast.Call):
            name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
            if name in ('setattr', 'delattr', '__setattr__'):
                yield name


@pytest.mark.parametrize('name, text', upper_files(), ids=lambda x: x[:40])
def test_private_parts_of_hosts_stand_in_one_file(name, text):
    for found in {*private_names(text)} - NOT_OF_HOSTS:
        assert (name, found) in PRIVATE, f'{found}: host_internals.py'
    for found in {*inherited_names(text)} - NOT_OF_HOSTS:
        of_backbone = name.startswith('mm/backbones/')
        if not (of_backbone and found in OF_BACKBONES):
            assert (name, found) in PRIVATE, found
    for found in replaced_names(text):
        if not name.startswith('tools/workshop'):  # replaces what is ours
            assert (name, found) in REPLACED, f'{found}: host_internals.py'


def test_exceptions_are_needed():
    texts = dict(upper_files())
    for name, found in PRIVATE:
        assert found in {*private_names(texts[name])}
    for name, found in REPLACED:
        assert found in {*replaced_names(texts[name])}


@pytest.mark.parametrize(
    'text, names',
    [
        ('runner._test_loop = 1', {'_test_loop'}),
        ('super()._validate_cfg()', {'_validate_cfg'}),
        ("getattr(module, '_is_init')", {'_is_init'}),
        ("object.__setattr__(config, '_filename', None)", {'_filename'}),
        ('from mmengine.config.utils import _hidden', {'_hidden'}),
        ('self._own, cls._own, __name__, x.__dict__', set()),
        ('self.runner._hooks', {'_hooks'}),
        ('nn.modules.batchnorm._BatchNorm', set()),
        ('class A:\n  _x = 1\nA._x', set()),
    ],
)
def test_the_test_of_private_names_bites(text, names):
    assert set(private_names(text)) == names


@pytest.mark.parametrize(
    'text, names',
    [
        ('from mmengine.runner import checkpoint as host\nhost.a = b', {'a'}),
        ('import mmcv\nmmcv.cnn.fuse_conv_bn = f', {'fuse_conv_bn'}),
        ('def f(): pass\nrunner.resume = f', {'resume'}),
        ('del head.forward', {'forward'}),
        ('setattr(place, name, 1)', {'setattr'}),
        ('def f(): pass\nself.a = f\nrunner.model = network', set()),
        ('def f(): pass\ndef g(): pass\nf.of_ours = g', set()),
    ],
)
def test_the_test_of_replaced_names_bites(text, names):
    assert set(replaced_names(text)) == names
