# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Branches that are linear: their kernel is a matrix times their weight.

Ding et al., "Re-parameterizing Your Optimizers rather than Architectures",
ICLR 2023, sec. 3.1 (https://arxiv.org/abs/2205.15242), calls a block of such
branches, each with a constant scale, CSLA (constant-scale linear addition).
Whether a branch is linear is found by probing it, so that branches from
outside the package count too.
"""

from __future__ import annotations

import dataclasses
from typing import (
    Any,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
)

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import block_of, refuse_unknown_keys
from mmdbb.branches.base import (
    Branch,
    build_branch,
    is_served,
    split_branch_cfg,
)
from mmdbb.geometry import ConvSpec

BranchCfg = Union[str, dict]

#: A norm that changes nothing in eval mode: mean 0, variance 1, no eps.
_NEUTRAL = dict(type=nn.BatchNorm2d, eps=0.0)


class LinearBranch(NamedTuple):
    """A branch as a linear map from its weight to its kernel.

    Attributes:
        cfg: Its name, or its config.
        key: Its name in the block, such as ``kxk_k5``; the second ``kxk`` is
            ``kxk_2``.
        size: Taps of its weight, such as (1, 1) or (3, 3); None for a branch
            without a weight, whose kernel is a constant times its scale.
        basis: Shape (taps of the weight, taps of the kernel): a weight
            (out, in / groups, taps) times this is the kernel. Without a
            weight it is the constant kernel (out, in / groups, kH, kW). In
            float64.
        is_dense: Whether the weight is the kernel itself.
    """

    cfg: BranchCfg
    key: str
    size: Optional[Tuple[int, ...]]
    basis: Tensor
    is_dense: bool = False


class LinearBranches(NamedTuple):
    """The linear branches of a block, and the names of the others."""

    branches: List[LinearBranch]
    left_out: List[str]


def linear_branches(
    spec: ConvSpec,
    block: Optional[dict] = None,
    branches: Optional[Sequence[BranchCfg]] = None,
) -> LinearBranches:
    """List the branches of a block that are linear.

    Args:
        spec: Geometry of the block's convolution.
        block: Config of a block that sums branches, ``dict(type=
            'RepVGGConv')`` by default. Of a preset, the branches that are not
            linear or do not serve the geometry are left out.
        branches: Names or configs of the branches, in place of the block's.

    Raises:
        TypeError: If ``block`` or ``branches`` is of another type.
        ValueError: If ``block`` sums no branches, or a branch that is listed
            by name is not linear or does not serve the geometry.
    """
    kind, config = block_of(block or dict(type='RepVGGConv'))
    if not issubclass(kind, BranchSumConv2d):
        raise ValueError(
            f'block={config["type"]!r} composes its kernel, and its branches '
            'are products of parameters; name a block that sums branches, '
            'such as RepVGGConv, ACB or DBB'
        )
    if branches is None:
        branches = config.get('branches')
    listed = branches is not None
    if listed and (isinstance(branches, (str, dict)) or not branches):
        raise TypeError(
            f'branches must be a list of branches, got {branches!r}'
        )
    found: List[LinearBranch] = []
    left_out: List[str] = []
    keys: List[str] = []
    if branches is None:
        branches = _preset_of(kind, config, spec)
    for cfg in branches:
        name = split_branch_cfg(cfg)[0]
        branch = None
        if listed or is_served(cfg, spec):
            with torch.device('cpu'):
                branch = _probed(cfg, spec)
        if branch is None and listed:
            raise ValueError(
                f'branch {name!r} is not linear in one weight, so it has no '
                'constant scale; leave it out of branches'
            )
        if branch is None:
            left_out.append(name)
            continue
        name = branch.key
        keys.append(name)
        count = keys.count(name)
        key = name if count == 1 else f'{name}_{count}'
        found.append(branch._replace(key=key))
    if not found:
        raise ValueError(
            f'{kind.__name__} has no linear branch for {spec}; name some by '
            "branches=['kxk', '1x1']"
        )
    return LinearBranches(found, left_out)


def _preset_of(
    kind: Type[BranchSumConv2d], config: dict, spec: ConvSpec
) -> Sequence[BranchCfg]:
    """The branches of a block's preset, as its config asks for them."""
    limits = 'type', 'branches', 'min_kernel_size', 'max_kernel_size'
    args = {k: v for k, v in config.items() if k not in limits}
    refuse_unknown_keys(kind, args)
    if spec.padding == 'adaptive':
        args['adaptive_padding'] = True
    return kind(**spec.conv_args, **args, device='meta').preset_branches()


def _probed(cfg: BranchCfg, spec: ConvSpec) -> Optional[LinearBranch]:
    """Find the map of a branch; None if it is not linear."""
    channels: Dict[str, Any]
    if spec.is_depthwise:  # where some branches have no weight
        channels = dict(in_channels=2, out_channels=2, groups=2)
    else:
        channels = dict(in_channels=2, out_channels=2, groups=1)
    with torch.random.fork_rng(devices=[]):
        small = dataclasses.replace(spec, **channels)
        branch = _neutral(cfg, small)
        key = split_branch_cfg(cfg)[0] + branch.suffix
        own = [
            parameter
            for module in branch.modules()
            if not isinstance(module, _BatchNorm)
            for parameter in module.parameters(recurse=False)
        ]
        if not own:
            kernel = _kernel(_neutral(cfg, spec))
            return LinearBranch(cfg, key, None, kernel)
        if len(own) > 1 or own[0].shape[:2] != small.kernel_shape[:2]:
            return None
        weight = own[0].data
        rows = []
        for i in range(weight[0, 0].numel()):
            weight.zero_()
            weight[0, 0].view(-1)[i] = 1
            rows.append(_kernel(branch)[0, 0].flatten())
        basis = torch.stack(rows)
        weight.normal_()
        expected = (weight.flatten(2) @ basis).reshape(small.kernel_shape)
    if not torch.allclose(_kernel(branch), expected, atol=1e-12):
        return None
    size, dense = tuple(weight.shape[2:]), torch.eye(basis.shape[1])
    is_dense = torch.equal(basis, dense.double())
    return LinearBranch(cfg, key, size, basis, is_dense)


def _neutral(cfg: BranchCfg, spec: ConvSpec) -> Branch:
    return build_branch(cfg, spec, _NEUTRAL).double().eval()


@torch.no_grad()
def _kernel(branch: Branch) -> Tensor:
    return branch.equivalent_kernel_bias().kernel.double()
