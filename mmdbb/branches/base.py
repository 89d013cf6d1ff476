# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A branch: one way from a block's input to its output."""

from __future__ import annotations

import inspect
from typing import Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.norm import (
    build_branch_norm,
    norm_scale_shift,
    run_norm,
)
from mmdbb.geometry import ConvSpec, IntPair, Pads, pad2d
from mmdbb.modules import tensors_of
from mmdbb.registry import BRANCHES
from mmdbb.transforms import KernelBias, fuse_conv_bn, pad_kernel


class Branch(nn.Module):
    """Base of all branches; in eval mode an affine function of the image.

    Norms are registered before convolutions: mmcv's ``fuse_conv_bn`` fuses a
    norm into the convolution registered before it, which across a padded
    border would be wrong. So it finds nothing to fuse here.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the branch's norms, ``dict(type='BN')`` if None.
    """

    #: What :meth:`supports` asks for, in the words of an error message.
    requirement = 'any geometry'

    def __init__(
        self, spec: ConvSpec, norm_cfg: Optional[dict] = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm_cfg = norm_cfg
        self._built_with = None

    def set_spec(self, spec: ConvSpec) -> None:
        """Take another stride, padding, dilation or padding mode.

        Args:
            spec: A geometry that :meth:`supports` allows, with the same
                channels, kernel size and groups.
        """
        self.spec = spec
        self._built_with = None

    def refuse_changed_geometry(self) -> None:
        """Raise a ValueError if an inner convolution was changed by itself.

        Hosts set ``stride`` or ``dilation`` of each convolution that they
        find in a built network. The block hands on what is set on itself.
        """
        found = [
            (conv.stride, conv.padding, conv.dilation, conv.padding_mode)
            for conv in self.children()
            if isinstance(conv, nn.Conv2d)
        ]
        if self._built_with is None:
            self._built_with = found
        if found != self._built_with:
            raise ValueError(
                'the stride, padding, dilation or padding mode of a '
                'convolution inside a block was changed, from '
                f'{self._built_with} to {found}; set it on the block, which '
                'hands it on'
            )

    @classmethod
    def supports(cls, spec: ConvSpec) -> bool:
        """Whether the branch can serve this geometry."""
        return True

    @property
    def last_norm(self) -> Optional[_BatchNorm]:
        """The norm whose weight (gamma) scales the whole branch, or None."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """From (N, in, H, W) to (N, out, H', W')."""
        raise NotImplementedError

    def equivalent_kernel_bias(self) -> KernelBias:
        """The branch in eval mode as one convolution.

        Returns:
            KernelBias: Kernel of the block's full shape (out, in / groups,
            kH, kW) and bias (out,), differentiable.
        """
        raise NotImplementedError

    def _norm(self, channels: int) -> _BatchNorm:
        return build_branch_norm(self.norm_cfg, channels)


class ConvNormBranch(Branch):
    """A convolution and a norm; the kernel is as large as the block's or less.

    A subclass says by :meth:`size` how large. Smaller kernels read the very
    pixels that their taps of the block's kernel read (see
    :mod:`mmdbb.geometry`).

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether there is a norm.
    """

    def __init__(
        self,
        spec: ConvSpec,
        norm_cfg: Optional[dict] = None,
        norm: bool = True,
    ) -> None:
        super().__init__(spec, norm_cfg)
        self.explicit_pads, geometry = self._own_geometry(spec)
        self.norm = self._norm(spec.out_channels) if norm else None
        self.conv = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            self.size(spec),
            groups=spec.groups,
            bias=False,
            **geometry,
        )

    def _own_geometry(self, spec: ConvSpec) -> Tuple[Optional[Pads], dict]:
        top, bottom, left, right = pads = spec.pads_of(self.size(spec))
        own_padding = top == bottom >= 0 and left == right >= 0
        # Pads that nn.Conv2d cannot do: uneven ones and crops.
        explicit_pads = None if own_padding else pads
        return explicit_pads, dict(
            stride=spec.stride,
            padding=(top, left) if own_padding else (0, 0),
            dilation=spec.dilation,
            padding_mode=spec.padding_mode if own_padding else 'zeros',
        )

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`Branch.set_spec`."""
        super().set_spec(spec)
        self.explicit_pads, geometry = self._own_geometry(spec)
        take_geometry(self.conv, geometry)

    @staticmethod
    def size(spec: ConvSpec) -> IntPair:
        """Height and width of the branch's kernel."""
        raise NotImplementedError

    @property
    def last_norm(self) -> Optional[_BatchNorm]:
        return self.norm

    def forward(self, x: Tensor) -> Tensor:
        if self.explicit_pads is not None:
            x = pad2d(x, self.explicit_pads, self.spec.padding_mode)
        y = self.conv(x)
        return y if self.norm is None else run_norm(self.norm, y)

    def equivalent_kernel_bias(self) -> KernelBias:
        kernel, bias = fuse_kernel_norm(self.conv.weight, self.norm)
        spec = self.spec
        offset = spec.offset_of(self.size(spec))
        return KernelBias(pad_kernel(kernel, spec.kernel_size, offset), bias)


def take_geometry(conv: nn.Conv2d, geometry: dict) -> None:
    """Give a built convolution another geometry.

    Args:
        conv: The convolution; its weights stay.
        geometry: Keyword arguments of ``nn.Conv2d``.
    """
    arguments = dict(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        groups=conv.groups,
    )
    like = nn.Conv2d(**{**arguments, **geometry}, device='meta')
    for name, value in vars(like).items():
        if name in ('stride', 'padding', 'dilation', 'padding_mode') or (
            name == '_reversed_padding_repeated_twice'
        ):
            setattr(conv, name, value)


def fuse_kernel_norm(kernel: Tensor, norm: Optional[_BatchNorm]) -> KernelBias:
    """Transform I for a kernel (out, in / groups, kH, kW) without a bias.

    Without a norm either, the kernel stays.
    """
    conv = KernelBias(kernel, zero_bias(kernel))
    return conv if norm is None else fuse_conv_bn(conv, norm_scale_shift(norm))


def zero_bias(kernel: Tensor) -> Tensor:
    """The bias (out,) of a convolution that has none."""
    return kernel.new_zeros(kernel.shape[0])


def build_branch(
    cfg: Union[str, dict], spec: ConvSpec, norm_cfg: Optional[dict] = None
) -> Branch:
    """Build a branch from its name or its config.

    Args:
        cfg: A name such as ``'1x1_kxk'``, or ``dict(type=name, ...)``.
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the branch's norms.

    Raises:
        TypeError: If ``cfg`` is neither, or has unknown keys.
        ValueError: If the name is unknown or the branch cannot serve the
            geometry.
    """
    name, args = split_branch_cfg(cfg)
    branch_type = BRANCHES.get(name)
    if not branch_type.supports(spec):
        raise ValueError(
            f'branch {name!r} needs {branch_type.requirement}, got {spec}; '
            'leave it out of branches'
        )
    allowed = [
        parameter
        for parameter in inspect.signature(branch_type).parameters
        if parameter not in ('spec', 'norm_cfg')
    ]
    unknown = sorted(set(args) - set(allowed))
    if unknown:
        raise TypeError(
            f'branch {name!r} got unknown keys {unknown}; allowed: '
            f'{["type", *allowed]}'
        )
    branch = branch_type(spec, norm_cfg, **args)
    branch.refuse_changed_geometry()  # notes what it is
    return branch


def split_branch_cfg(cfg: Union[str, dict]) -> tuple:
    """Name and arguments of a branch's config.

    Raises:
        TypeError: If it is neither a name nor a config.
        ValueError: If no branch has this name.
    """
    args = dict(type=cfg) if isinstance(cfg, str) else cfg
    if not isinstance(args, dict) or not isinstance(args.get('type'), str):
        raise TypeError(
            f'a branch is a name or a dict(type=name, ...), got {cfg!r}'
        )
    args = dict(args)
    name = args.pop('type')
    if name not in BRANCHES:
        raise ValueError(
            f'unknown branch {name!r}; allowed: {sorted(BRANCHES.module_dict)}'
        )
    return name, args


def leaf_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's kernels, or of its norms if it has none."""
    floating = [t for t in tensors_of(module) if t.is_floating_point()]
    return sorted(floating, key=lambda t: -t.dim())[0].dtype
