# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merge blocks of other packages by the methods that these blocks have.

mmpretrain's and mmyolo's RepVGG and MobileOne, timm's RepVGG, MobileOne,
FastViT and RepViT, ultralytics' RepConv and RepVGGDW all merge themselves, by
methods of several names. No package is imported for this: a block is known by
its method. Some of these methods have been wrong, so each merged block is
compared with the block that it was.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
)

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.dimensions import CONVS
from mmdbb.modules import in_eval_mode, named_values

#: Largest difference of a merged block from the block that it was, in float64
#: and relative to the largest output.
TOLERANCE = 1e-9


class OwnMerge(NamedTuple):
    """How blocks of a package merge themselves.

    Attributes:
        method: Name of the method, which takes no arguments. It changes the
            block in place, or returns the layer that takes its place.
        forward: Name of the method that is the block's forward afterwards;
            None if its forward stays.
    """

    method: str
    forward: Optional[str] = None


#: The methods, in the order in which a block is asked for them.
OWN_MERGES = (
    # ultralytics' and YOLOv9's RepConv
    OwnMerge('fuse_convs', 'forward_fuse'),
    # the code of RepVGG's paper, mmpretrain, mmyolo, timm's RepGhost
    OwnMerge('switch_to_deploy'),
    # the large kernels of RepLKNet's paper, mmpretrain and UniRepLKNet
    OwnMerge('merge_kernel'),
    OwnMerge('merge_dilated_branches'),
    # timm's RepVGG, MobileOne and FastViT
    OwnMerge('reparameterize'),
    # ultralytics' RepVGGDW; timm's RepViT, which returns the new layer
    OwnMerge('fuse', 'forward_fuse'),
)


class OwnMerged(NamedTuple):
    """What :func:`merge_own_blocks` returns.

    Attributes:
        model: The merged model.
        blocks: Names of the blocks that were merged.
        not_compared: Names of those that could not be run by themselves.
    """

    model: nn.Module
    blocks: List[str]
    not_compared: List[str]


def has_own_blocks(model: nn.Module) -> bool:
    """Whether a model has blocks of other packages that are not merged.

    Args:
        model: Any model; unchanged.
    """
    return any(
        _merged(module, '') is not None
        for module in model.modules()
        if not isinstance(module, ReparamConv2d) and any(_methods(module))
    )


def merge_own_blocks(model: nn.Module) -> OwnMerged:
    """Merge the blocks of other packages in a copy of a model.

    Args:
        model: A model without blocks of mmdbb inside these blocks; unchanged.

    Raises:
        ValueError: If a block's own method fails, or gives a layer that
            computes something else.
    """
    found = OwnMerged(model, [], [])
    merged = _merge(copy.deepcopy(model), '', found, {})
    return found._replace(model=merged)


def _merge(
    module: nn.Module,
    name: str,
    found: OwnMerged,
    known: Dict[nn.Module, nn.Module],
) -> nn.Module:
    """Merge a module and what is inside it, the outermost blocks first."""
    if module in known or isinstance(module, ReparamConv2d):
        return known.get(module, module)
    merged = _merged(module, name)
    if merged is not None:
        if not _is_proven(module, merged, name):
            found.not_compared.append(name)
        found.blocks.extend(
            _join(name, inner) for inner in _innermost(module, merged)
        )
        merged = merged.to(_dtype_of(module))
    known[module] = merged = module if merged is None else merged
    for child, inside in list(merged._modules.items()):
        if inside is not None:
            merged._modules[child] = _merge(
                inside, _join(name, child), found, known
            )
    return merged


@torch.no_grad()
def _merged(block: nn.Module, name: str) -> Optional[nn.Module]:
    """A merged copy of a block, in float64; None if it does not merge itself.

    Raises:
        ValueError: If the block's method fails.
    """
    kind = next(_methods(block), None)
    if kind is None:
        return None
    twin = copy.deepcopy(block).double()
    try:
        with _float64():
            result = getattr(twin, kind.method)()
    except Exception as error:
        raise ValueError(
            f'{name or "the block"} cannot be merged by its own '
            f'{type(block).__name__}.{kind.method}: '
            f'{type(error).__name__}: {error}'
        ) from error
    if isinstance(result, nn.Module) and result is not twin:
        twin = result
    elif kind.forward is not None:
        if not hasattr(twin, kind.forward):
            return None  # such a method does something else
        twin.forward = getattr(twin, kind.forward)
    if twin.state_dict().keys() == block.state_dict().keys():
        return None  # merged already
    for module in twin.modules():  # hosts' train() does more than this
        module.training = block.training
    return twin


def _methods(module: nn.Module) -> Iterator[OwnMerge]:
    for kind in OWN_MERGES:
        method = getattr(type(module), kind.method, None)
        if callable(method) and _is_of_its_own(method):
            yield kind


def _is_of_its_own(method: Callable) -> bool:
    """Whether a method takes no arguments, and is not one of mmdbb's."""
    if getattr(method, '__module__', '').partition('.')[0] == 'mmdbb':
        return False
    return len(inspect.signature(method).parameters) == 1


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Within the context, new layers are in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _innermost(block: nn.Module, merged: nn.Module) -> List[str]:
    """Names of the smallest blocks in a block that have merged themselves."""
    after = dict(merged.named_modules())
    changed = [
        name
        for name, module in block.named_modules()
        if any(_methods(module))
        and name in after
        and after[name].state_dict().keys() != module.state_dict().keys()
    ]
    smallest = [
        name
        for name in changed
        if not any(_is_inside(other, name) for other in changed)
    ]
    return smallest or ['']


def _is_inside(name: str, other: str) -> bool:
    return name != other and name.startswith(f'{other}.' if other else '')


@torch.no_grad()
def _is_proven(block: nn.Module, merged: nn.Module, name: str) -> bool:
    """Compare a block with the layer it became, on random input.

    Returns:
        bool: False if the block does not run on any input that it seems to
        take.

    Raises:
        ValueError: If the layer computes something else.
    """
    exact = copy.deepcopy(block).double()
    with in_eval_mode(exact, merged):
        for x in _inputs(exact):
            try:
                expected = exact(x)
            except Exception:  # blocks raise all kinds of errors
                continue
            if not isinstance(expected, (Tensor, list, tuple)):
                continue
            found = merged(x)
            error = max(
                _distance(a, b) for a, b in zip(_flat(found), _flat(expected))
            )
            if not error <= TOLERANCE:
                raise ValueError(
                    f'{name or "the block"} computes something else once its '
                    f'own method has merged it: {type(block).__name__} '
                    f'differs by {error:.1e} of its largest output'
                )
            return True
    return False


#: Number of dimensions -> the size of random images.
_SIZES = {1: (64,), 2: (64, 48), 3: (8, 24, 16)}


def _inputs(block: nn.Module) -> Iterator[Tensor]:
    """Random inputs that a block may take, images before tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes: Dict[Tuple[int, ...], bool] = {}
    for module in block.modules():
        own: Any = module
        if isinstance(module, (*CONVS, ReparamConv2d)):
            images = (2, own.in_channels, *_SIZES[len(own.kernel_size)])
            shapes[images] = True
        elif isinstance(module, nn.BatchNorm2d):
            images = (2, module.num_features, *_SIZES[2])
            shapes[images] = True
        elif isinstance(module, nn.Linear):
            shapes[2, 49, module.in_features] = True
        elif isinstance(module, nn.BatchNorm1d):
            shapes[2, module.num_features] = True
    for shape in shapes:
        yield torch.randn(shape, generator=generator, dtype=torch.float64)


def _flat(outputs) -> List[Tensor]:
    return [value for _, value in named_values('', outputs)]


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float('nan')
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((found - expected).abs().max() / scale).item()


def _dtype_of(block: nn.Module) -> torch.dtype:
    values = (v for v in block.state_dict().values() if v.is_floating_point())
    return next(values).dtype


def _join(name: str, child: str) -> str:
    return f'{name}.{child}' if name and child else name or child
