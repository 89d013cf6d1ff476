# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The base of all branches: a branch maps a block's input to its output."""

from __future__ import annotations

import inspect
from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mmdbb.branches.norm import (
    build_branch_norm,
    norm_for,
    norm_scale_shift,
    run_norm,
)
from mmdbb.dimensions import CONV_TYPES, CONVS, LayerKind, kind_of
from mmdbb.geometry import (
    ConvSpec,
    IntPair,
    Pads,
    crop_unread,
    pad_images,
)
from mmdbb.modules import tensors_of
from mmdbb.registry import BRANCHES
from mmdbb.transforms import (
    KernelBias,
    dilate_kernel,
    fuse_conv_bn,
    pad_kernel,
    swap_channels,
)


class Branch(nn.Module):
    """Base of all branches. In eval mode a branch equals one convolution.

    Subclasses register norms before convolutions. mmcv's ``fuse_conv_bn``
    fuses a norm into the convolution registered before it, which would be
    wrong across a padded border; in this order it finds nothing to fuse.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the branch's norms, ``dict(type='BN')`` if None.
    """

    #: What :meth:`supports` requires, as an error message says it.
    requirement = 'any geometry'

    #: Whether the branch is a kernel of the block's full size and one norm,
    #: so that it can take any plain kernel.
    is_dense = False

    #: Ending of the branch's key in a block. Branches of one name that differ
    #: in form can have keys that say how.
    suffix = ''

    def __init__(
        self, spec: ConvSpec, norm_cfg: Optional[dict] = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm_cfg = norm_cfg
        self._built_with: Optional[list] = None

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """Add a module; a SyncBN gives way to a norm without shift."""
        place = self._modules.get(name)
        super().add_module(name, norm_for(place, module))

    def set_spec(self, spec: ConvSpec) -> None:
        """Take another stride, padding, dilation or padding mode.

        Args:
            spec: A geometry that :meth:`supports` allows, with the same
                channels, kernel size and groups.
        """
        self.spec = spec
        self._built_with = None

    def take_size(self, spec: ConvSpec) -> None:
        """Take the geometry for images of one size; only the pads differ.

        Args:
            spec: The branch's geometry at this size.
        """
        self.spec = spec

    def refuse_changed_geometry(self) -> None:
        """Raise a ValueError if someone changed a convolution inside.

        OpenMMLab packages set ``stride`` or ``dilation`` of the convolutions
        that they find in a built network. A block passes on to its branches
        what is set on itself; set on a single branch, it would no longer fit
        the others. A bias that a convolution was given would be in no kernel.
        """
        found = [
            (
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.padding_mode,
                conv.bias is not None,
            )
            for conv in self.children()
            if isinstance(conv, CONVS)
        ]
        if self._built_with is None:
            self._built_with = found
        if found != self._built_with:
            raise ValueError(
                'the stride, padding, dilation or padding mode of a '
                'convolution inside a block was changed, or it was given a '
                f'bias, from {self._built_with} to {found}; set it on the '
                'block, which hands it on'
            )

    @classmethod
    def supports(cls, spec: ConvSpec) -> bool:
        """Whether a branch of this kind can be built for a geometry.

        A subclass may take arguments of its own here as well, by the names
        that they have in its constructor, with the same defaults.

        Args:
            spec: Geometry of the block's convolution.
        """
        return True

    @property
    def last_norm(self) -> Optional[_BatchNorm]:
        """The norm whose weight (gamma) scales the whole branch, or None."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Compute the branch: images (N, in, H, W) to (N, out, H', W')."""
        raise NotImplementedError

    def equivalent_kernel_bias(self) -> KernelBias:
        """Merge the branch, as it is in eval mode, into one convolution.

        Returns:
            KernelBias: Kernel of the block's full shape (out, in / groups,
            kH, kW) and bias (out,), differentiable.
        """
        raise NotImplementedError

    def _norm(self, channels: int) -> _BatchNorm:
        return build_branch_norm(self.norm_cfg, channels, self.spec.dims)

    def _pointwise(self, channels: int) -> _ConvNd:
        """A 1x1 convolution from the block's input to so many channels."""
        spec = self.spec
        return CONV_TYPES[LayerKind(spec.dims)](
            spec.in_channels, channels, 1, groups=spec.groups, bias=False
        )


class ConvNormBranch(Branch):
    """A convolution and a norm; its kernel may be smaller than the block's.

    A subclass gives the size of its kernel in :meth:`size`, and the distance
    between its taps in :attr:`tap_dilation`. A smaller kernel reads the same
    pixels as the block's kernel does at the same taps (see
    :mod:`mmdbb.geometry`).

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
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
        self.conv: _ConvNd = CONV_TYPES[spec.kind](
            spec.in_channels,
            spec.out_channels,
            self.size(spec),
            groups=spec.groups,
            bias=False,
            **geometry,
        )

    def _own_geometry(self, spec: ConvSpec) -> Tuple[Optional[Pads], dict]:
        pads = self._pads(spec)
        moves = dict(
            stride=spec.stride,
            dilation=tuple(
                d * r for d, r in zip(spec.dilation, self._dilation(spec))
            ),
        )
        if spec.transposed:
            if self.size(spec) != spec.kernel_size:
                return pads, moves
            padding, extra = spec.padding, spec.output_padding
            return None, dict(moves, padding=padding, output_padding=extra)
        own_padding = pads[::2] == pads[1::2] and min(pads) >= 0
        own_padding = own_padding and spec.padding != 'adaptive'
        # nn.Conv2d cannot pad unevenly, nor crop, nor look at the image.
        explicit_pads = None if own_padding else pads
        return explicit_pads, dict(
            moves,
            padding=pads[::2] if own_padding else (0,) * spec.dims,
            padding_mode=spec.padding_mode if own_padding else 'zeros',
        )

    def take_size(self, spec: ConvSpec) -> None:
        """See :meth:`Branch.take_size`."""
        super().take_size(spec)
        self.explicit_pads = self._pads(spec)
        if spec.transposed:
            self.explicit_pads, geometry = self._own_geometry(spec)
            vars(self.conv).update(geometry)  # of a twin of the branch

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`Branch.set_spec`."""
        super().set_spec(spec)
        self.explicit_pads, geometry = self._own_geometry(spec)
        take_geometry(self.conv, geometry)

    #: Distance between two neighbouring taps of the branch's kernel, in taps
    #: of the block's kernel, in each dimension; None means 1.
    tap_dilation: Optional[IntPair] = None

    def size(self, spec: ConvSpec) -> IntPair:
        """Size of the branch's kernel in taps, in each dimension.

        Args:
            spec: Geometry of the block's convolution.
        """
        raise NotImplementedError

    def _dilation(self, spec: ConvSpec) -> IntPair:
        return self.tap_dilation or (1,) * len(spec.kernel_size)

    def _pads(self, spec: ConvSpec) -> Pads:
        return spec.pads_of(self.size(spec), self._dilation(spec))

    @property
    def last_norm(self) -> Optional[_BatchNorm]:
        return self.norm

    def forward(self, x: Tensor) -> Tensor:
        pads, spec = self.explicit_pads, self.spec
        if pads is not None and not spec.transposed:
            x = pad_images(x, pads, spec.padding_mode)
        y = run_conv(self.conv, x)
        if pads is not None and spec.transposed:
            y = pad_images(y, pads)
        return y if self.norm is None else run_norm(self.norm, y)

    def equivalent_kernel_bias(self) -> KernelBias:
        spec = self.spec
        kernel = kernel_of(self.conv.weight, spec)
        kernel, bias = fuse_kernel_norm(kernel, self.norm)
        dilation = self._dilation(spec)
        offset = spec.offset_of(self.size(spec), dilation)
        kernel = dilate_kernel(kernel, dilation)
        return KernelBias(pad_kernel(kernel, spec.kernel_size, offset), bias)


def run_conv(conv: _ConvNd, x: Tensor) -> Tensor:
    """Run a layer of a branch, around what oneDNN computes wrongly.

    Args:
        conv: The layer.
        x: Its images, of shape (N, in, H, W).

    Returns:
        Tensor: Its output, (N, out, H', W').
    """
    # Where a parametrization computes the weight, it is not there yet.
    return conv(crop_unread(x, conv, conv._parameters.get('weight')))


def kernel_of(weight: Tensor, spec: ConvSpec) -> Tensor:
    """The kernel (out, in / groups, ...) that torch's weight holds.

    Args:
        weight: The weight of torch's convolution.
        spec: Its geometry.
    """
    return swap_channels(weight, spec.groups) if spec.transposed else weight


def take_geometry(conv: _ConvNd, geometry: dict) -> None:
    """Give a built convolution another geometry.

    Args:
        conv: The convolution, changed in place. Its weights stay.
        geometry: The arguments to change, such as ``stride``, by the names
            of ``nn.Conv2d``'s arguments.
    """
    arguments = dict(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        groups=conv.groups,
    )
    kind: Any = kind_of(conv)  # never None: it is one of torch's
    like = CONV_TYPES[kind](**{**arguments, **geometry}, device='meta')
    for name, value in vars(like).items():
        if name in _GEOMETRY:
            setattr(conv, name, value)


_GEOMETRY = (
    'stride',
    'padding',
    'dilation',
    'padding_mode',
    'output_padding',
    '_reversed_padding_repeated_twice',
)


def fuse_kernel_norm(kernel: Tensor, norm: Optional[_BatchNorm]) -> KernelBias:
    """Fuse a norm into a kernel that has no bias (Transform I).

    Args:
        kernel: Shape (out, in / groups, kH, kW).
        norm: The norm behind it; None leaves the kernel as it is.

    Returns:
        KernelBias: The fused kernel, of the same shape, and bias (out,).
    """
    conv = KernelBias(kernel, zero_bias(kernel))
    return conv if norm is None else fuse_conv_bn(conv, norm_scale_shift(norm))


def zero_bias(kernel: Tensor) -> Tensor:
    """A bias of zeros, (out,), for a kernel (out, in / groups, kH, kW)."""
    return kernel.new_zeros(kernel.shape[0])


def build_branch(
    cfg: Union[str, dict], spec: ConvSpec, norm_cfg: Optional[dict] = None
) -> Branch:
    """Build a branch from its name or its config.

    Args:
        cfg: A name such as ``'1x1_kxk'``, or ``dict(type=name, ...)``.
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the branch's norms, ``dict(type='BN')`` if None.

    Raises:
        TypeError: If ``cfg`` is neither a name nor a dict, or has unknown
            keys.
        ValueError: If the name is unknown, or the branch does not support
            the geometry.
    """
    name, args = split_branch_cfg(cfg)
    branch_type = BRANCHES.module_dict[name]
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
    if not is_served(cfg, spec):
        raise ValueError(
            f'branch {named(cfg)!r} needs {branch_type.requirement}, got '
            f'{spec}; leave it out of branches'
        )
    branch = branch_type(spec, norm_cfg, **args)
    branch.refuse_changed_geometry()  # notes the geometry it is built with
    return branch


def split_branch_cfg(cfg: Union[str, dict]) -> tuple:
    """Split a branch's config into its name and its arguments.

    Args:
        cfg: A name such as ``'1x1_kxk'``, or ``dict(type=name, ...)``.

    Returns:
        tuple: The name, and a dict of the other keys.

    Raises:
        TypeError: If ``cfg`` is neither a name nor a config.
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


def is_served(cfg: Union[str, dict], spec: ConvSpec) -> bool:
    """Whether the branch that a config describes can be built.

    Args:
        cfg: A name such as ``'1x1_kxk'``, or ``dict(type=name, ...)``.
        spec: Geometry of the block's convolution.

    Raises:
        TypeError: If ``cfg`` is neither a name nor a config, or an argument
            that decides has the wrong type.
        ValueError: If no branch has this name, or such an argument is out of
            range.
    """
    name, args = split_branch_cfg(cfg)
    supports = BRANCHES.module_dict[name].supports
    deciding = inspect.signature(supports).parameters
    return supports(spec, **{k: args[k] for k in args if k in deciding})


def named(cfg: Union[str, dict]) -> str:
    """A branch's name for messages, with the arguments that decide its form.

    Args:
        cfg: A name such as ``'1x1_kxk'``, or ``dict(type=name, ...)``.

    Examples:
        >>> named('1x1'), named(dict(type='kxk', kernel_size=5, dilation=2))
        ('1x1', 'kxk (kernel_size=5, dilation=2)')
    """
    name, args = split_branch_cfg(cfg)
    deciding = inspect.signature(
        BRANCHES.module_dict[name].supports
    ).parameters
    given = [f'{k}={v!r}' for k, v in args.items() if k in deciding]
    return f'{name} ({", ".join(given)})' if given else name


def leaf_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's kernels, or of its norms if it has no kernel.

    Kernels have more dimensions than all other tensors, which is how they are
    told apart. Under mixed precision the norms may have another dtype.
    """
    floating = [t for t in tensors_of(module) if t.is_floating_point()]
    return sorted(floating, key=lambda t: -t.dim())[0].dtype
