"""What is registered, for the tests: none keeps a list of its own.

A part that is registered before pytest collects is in every test of the
properties it has, because the tests ask here. test_registered.py sees to it
that a wrong one fails them.
"""

import inspect

import mmengine.registry
import pytest
from mmengine.registry import Registry
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb import official
from mmdbb.blocks import BranchSumConv2d, ComposedKernelConv2d
from mmdbb.blocks.build import registered_blocks
from mmdbb.branches import Identity
from mmdbb.geometry import ConvSpec
from mmdbb.kernels import ComposedKernel
from mmdbb.registry import BRANCHES

# Blocks


def each_block(*properties, argument='kind', alike=False):
    """Run a test with every registered block that has these properties.

    Those that stand for an nn.Conv2d. The others are forms of them, see
    test_blocks/test_forms.py.

    Args:
        properties: Functions from a block's class to whether it does.
        argument: The test's, which gets the class.
        alike: As of :func:`blocks`.
    """
    found = blocks(*properties, alike=alike)
    return pytest.mark.parametrize(argument, found)


def blocks(*properties, alike=False):
    """The registered blocks with these properties, named as in configs.

    Args:
        properties: Functions from a block's class to whether it does.
        alike: Whether to count those that differ from an earlier one in
            nothing but the number of their branches, or for large kernels
            only. What tests look at is a kernel of 3x3; see
            test_large_kernels.py for the others.
    """
    kinds = registered_blocks() if alike else distinct_blocks()
    found = [
        pytest.param(kind, id=name)
        for name, kind in kinds.items()
        if all(has(kind) for has in properties)
    ]
    assert found, f'no registered block has {properties}'
    return found


def branches_of_pictures():
    """Names of the branches that an nn.Conv2d can have."""
    spec = ConvSpec(4, 4, 3, padding=1)
    return sorted(
        name
        for name, branch in BRANCHES.module_dict.items()
        if branch.supports(spec)
    )


def distinct_blocks():
    """Names -> registered blocks that are, at 3x3, no sum of another one."""
    found = {}
    for name, kind in registered_blocks().items():
        first = found.setdefault(_sort_of(kind), (name, kind))
        if len(_branches(kind)) < len(_branches(first[1])):
            found[_sort_of(kind)] = (name, kind)
    return dict(found.values())


def _branches(kind):
    if not sums_branches(kind):
        return []
    return list(example_of(kind).branches.values())


def _sort_of(kind):
    """What distinguishes a block from others, whatever its name."""
    if not sums_branches(kind):
        return kind
    branches = frozenset(
        (type(branch), branch.last_norm is None) for branch in _branches(kind)
    )
    own = [getattr(kind, name) for name in ('_compose', 'forward_branches')]
    return branches, example_of(kind).norm is None, *own


def name_of(kind):
    """A block's name in configs."""
    return {k: name for name, k in registered_blocks().items()}[kind]


def example_of(kind):
    """A block of this kind with all its branches, to ask what it has."""
    return kind(4, 4, 3, padding=1)


def holds(kind, part):
    return any(isinstance(m, part) for m in example_of(kind).modules())


def sums_branches(kind):
    """Whether its output is a sum, so that ``branches`` says of what."""
    return issubclass(kind, BranchSumConv2d)


def sums_several(kind):
    return sums_branches(kind) and len(example_of(kind).branches) > 1


def has_gammas(kind):
    """Whether every branch ends in a norm, so that one can start alone."""
    return sums_branches(kind) and all(
        branch.last_norm is not None
        for branch in example_of(kind).branches.values()
    )


def has_norms(kind):
    """Whether it has norms inside, so that its host's norm may go."""
    return holds(kind, _BatchNorm)


def has_identity(kind):
    """Whether its input, or a norm of it, is one of the summands."""
    return holds(kind, Identity)


def is_composed(kind):
    """Whether it is one composed kernel, and no sum."""
    return issubclass(kind, ComposedKernelConv2d)


def keeps_its_kernel(kind):
    """Whether in eval mode it is one convolution, its kernel kept."""
    return sums_branches(kind) or is_composed(kind)


def has_starts(kind):
    """Whether its scales can be set, as single_init does."""
    return hasattr(kind, 'init_gamma') and hasattr(kind, 'single_init')


def has_no_composed_kernel(kind):
    return not holds(kind, ComposedKernel)


def has_custom_l2(kind):
    return hasattr(kind, 'get_custom_L2')


def starts_plain(kind):
    """Whether it can start as any plain convolution of 3x3 pixels."""
    if is_composed(kind):
        return kind.starts_plain((3, 3))
    if not sums_branches(kind):
        return False
    example = example_of(kind)
    return example.norm is None and example.dense_branch is not None


def starts_otherwise(kind):
    return not starts_plain(kind)


def is_block_of(kind, size):
    """Whether configs make a kernel of this size a block, unless told."""
    smallest, largest = kind.kernel_sizes
    return smallest <= size <= largest


# The papers' classes, which are no layers of configs


def each_paper(*properties, argument='block'):
    """As :func:`each_block`, of the papers' own classes."""
    found = [
        pytest.param(kind, id=name)
        for name, kind in papers().items()
        if all(has(kind) for has in properties)
    ]
    assert found, f'no class of the papers has {properties}'
    return pytest.mark.parametrize(argument, found)


def papers():
    return {name: getattr(official, name) for name in official.__all__}


def has_usual_arguments(kind):
    """Whether it takes nn.Conv2d's arguments, and ``deploy``, as a DBB."""
    return all(takes(name)(kind) for name in ('padding', 'deploy'))


def takes(argument):
    """The property of a class that it can be built with this argument."""
    return lambda kind: argument in inspect.signature(kind).parameters


def size_of(kind):
    """A kernel that a class of the papers takes: 3x3 if it does."""
    for size in (3, 7, 1):
        try:
            kind(4, 4, size)
        except ValueError:
            continue
        return size
    raise ValueError(f'{kind.__name__} takes none of the usual kernels')


# The rest, from the registries of OpenMMLab's packages


def registered_here(registry):
    """Names -> what mmdbb registered there, or below it."""
    found = {
        name: part
        for name, part in registry.module_dict.items()
        if part.__module__.split('.')[0] == 'mmdbb'
    }
    for child in registry.children.values():
        found.update(registered_here(child))
    return found


def registries():
    """Names -> the root registries of mmengine."""
    return {
        name: value
        for name, value in vars(mmengine.registry).items()
        if isinstance(value, Registry)
    }
