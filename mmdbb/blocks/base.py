# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What every block is to its host: a convolution that can be merged."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from typing import Callable, Iterator, Tuple, Union

import torch
from torch import Tensor, nn

from mmdbb.branches.base import leaf_dtype, take_geometry, zero_bias
from mmdbb.geometry import ConvSpec, IntPair
from mmdbb.modules import cast, fresh_weights, tensors_of
from mmdbb.ports import PORTS
from mmdbb.recompute import without_autocast
from mmdbb.transforms import KernelBias

#: The precisions that kernels can be composed in.
COMPOSED_IN = (torch.float64, torch.float32)


def _geometry(name: str, fixed: bool = False) -> property:
    """An attribute of ``nn.Conv2d`` that stands in the block's spec."""

    def get(self: ReparamConv2d):
        return getattr(self.spec, name)

    def put(self: ReparamConv2d, value) -> None:
        spec = dataclasses.replace(self.spec, **{name: value})
        if fixed and spec != self.spec:
            raise ValueError(
                f'{name} of a {type(self).__name__} is fixed when it is '
                f'built: {getattr(self.spec, name)}, got {value}; build '
                'another block'
            )
        if spec != self.spec:
            self.set_spec(spec)

    return property(get, put)


class ReparamConv2d(nn.Module):
    """A convolution that is trained as more than its kernel.

    To its host it looks like an ``nn.Conv2d``: same arguments, same
    attributes, same shapes. A subclass builds its structure unless
    ``deploy`` is true, and says what it computes in :meth:`forward_train`
    and :meth:`_compose`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, or one number.
        stride: Step in pixels.
        padding: Pixels on each side, ``'same'`` or ``'valid'``.
        dilation: Distance of two taps in pixels.
        groups: Number of groups.
        bias: As in ``nn.Conv2d``. No parameter is added where the block has
            a shift of its own.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        deploy: Whether to build the merged convolution at once, to load
            merged weights.
        init_cfg: mmengine's initialisation rules for this block.
    """

    #: Smallest and largest kernel (the longer side, in pixels) that configs
    #: make a block, unless they say otherwise.
    kernel_sizes: Tuple[int, float] = (2, 6)

    #: Whether a block with ``bias=False`` merges into one with a bias.
    _has_shift = True

    transposed = False
    output_padding = (0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, IntPair],
        stride: Union[int, IntPair] = 1,
        padding: Union[int, str, IntPair] = 0,
        dilation: Union[int, IntPair] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        deploy: bool = False,
        init_cfg: Union[dict, list, None] = None,
    ) -> None:
        super().__init__()
        self.init_cfg = copy.deepcopy(init_cfg)
        #: Whether ``init_weights`` was called, which mmengine looks for.
        self.is_init = False
        self.spec = ConvSpec(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode,
        )
        self._initializing = False
        self._cached_kernel = None
        self._wants_bias = bias
        if deploy:
            self.reparam_conv = nn.Conv2d(
                **self.spec.conv_args, bias=bias or self._has_shift
            )

    in_channels = _geometry('in_channels', fixed=True)
    out_channels = _geometry('out_channels', fixed=True)
    kernel_size = _geometry('kernel_size', fixed=True)
    groups = _geometry('groups', fixed=True)
    stride = _geometry('stride')
    padding = _geometry('padding')
    dilation = _geometry('dilation')
    padding_mode = _geometry('padding_mode')

    def set_spec(self, spec: ConvSpec) -> None:
        """Take another geometry, as hosts do that dilate a built network.

        Setting ``stride``, ``padding``, ``dilation`` or ``padding_mode`` does
        so too.

        Args:
            spec: With the same channels, kernel size and groups.

        Raises:
            ValueError: If a branch cannot serve this geometry.
        """
        self.spec = spec
        if self.deploy:
            take_geometry(self.reparam_conv, spec.conv_args)

    @property
    def deploy(self) -> bool:
        """Whether the block is merged."""
        return 'reparam_conv' in self._modules

    def forward(self, x: Tensor) -> Tensor:
        """From (N, in, H, W) to (N, out, H', W').

        As ``nn.Conv2d`` it also takes one image of shape (in, H, W).

        Raises:
            TypeError: If torch.fx traces through the block.
            ValueError: If ``x`` has another number of dimensions.
        """
        if self.deploy:
            return self.reparam_conv(x)
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                f'torch.fx cannot trace through a {type(self).__name__}, '
                'whose way depends on its input: merge first, by '
                'mmdbb.reparameterize(model), or let the tracer take '
                'mmdbb.ReparamConv2d for a leaf'
            )
        if x.dim() == 3:
            return self.forward_train(x[None])[0]
        if x.dim() != 4:
            raise ValueError(
                f'{type(self).__name__} takes images of shape (N, C, H, W) '
                f'or (C, H, W), got {tuple(x.shape)}'
            )
        return self.forward_train(x)

    def forward_train(self, x: Tensor) -> Tensor:
        """The block before merging, in training and in eval mode."""
        raise NotImplementedError

    def forward_branches(self, x: Tensor) -> Tensor:
        """The same, each branch by itself: the reference for verification.

        A block that is no sum has no other way than :meth:`forward_train`.
        """
        return type(self).forward_train(self, x)  # literal_forward sets ours

    def get_equivalent_kernel_bias(self) -> KernelBias:
        """The block in eval mode as one convolution.

        Returns:
            KernelBias: Kernel (out, in / groups, kH, kW) and bias (out,),
            differentiable in the block's parameters.

        Raises:
            ValueError: If a hook inside the block may change what it
                computes.
        """
        if self.deploy:
            kernel, bias = self.reparam_conv.weight, self.reparam_conv.bias
            bias = zero_bias(kernel) if bias is None else bias
            return KernelBias(kernel, bias)
        tensor = next(tensors_of(self), None)
        device = torch.device('meta') if tensor is None else tensor.device
        with fresh_weights(self), without_autocast(device):
            return self._compose()

    def _compose(self) -> KernelBias:
        raise NotImplementedError

    @classmethod
    def starts_plain(cls, kernel_size: IntPair) -> bool:
        """Whether a block of this size can start as any plain convolution.

        Args:
            kernel_size: Height and width in pixels.
        """
        return True

    @torch.no_grad()
    def to_conv(self, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        """The plain convolution that computes what the block does in eval.

        It has the block's dtype, device and mode; its parameters require a
        gradient. It has no bias where the block can have no shift, which is a
        composed kernel with ``bias=False``.

        Args:
            dtype: What it is composed in, ``torch.float64`` or
                ``torch.float32``.

        Raises:
            ValueError: If the kernel or the bias is not finite, or ``dtype``
                is another one.
        """
        if dtype not in COMPOSED_IN:
            raise ValueError(
                f'dtype must be one of {COMPOSED_IN}, got {dtype!r}'
            )
        device = next(tensors_of(self)).device
        own_dtype = leaf_dtype(self)
        # Apple's GPUs have no float64.
        work = 'cpu' if device.type == 'mps' else device
        composed = cast(self, work, dtype).get_equivalent_kernel_bias()
        owner = self.reparam_conv if self.deploy else self
        has_bias = self._has_shift or owner.bias is not None
        conv = nn.Conv2d(**self.spec.conv_args, bias=has_bias, device='meta')
        names = ('weight', 'bias') if has_bias else ('weight',)
        if not has_bias and not composed.bias.is_meta and composed.bias.any():
            raise ValueError(
                f'{type(self).__name__} composes a bias, but says by '
                '_has_shift that without bias=True it has none'
            )
        for name, value in zip(names, composed):
            # A copy, as a merged block gives its own parameters.
            value = value.to(
                device,
                own_dtype,
                copy=True,
                memory_format=torch.contiguous_format,
            )
            # A sum is finite if all of its terms are; in double it cannot
            # overflow. Far cheaper than asking each number.
            if not (
                value.is_meta
                or value.cpu().sum(dtype=torch.float64).isfinite()
            ):
                raise ValueError(
                    'the merged kernel is not finite: a parameter or a '
                    'running statistic of the block is NaN, infinite, or a '
                    'variance is negative'
                )
            setattr(conv, name, nn.Parameter(value))
        return conv.train(self.training)

    def switch_to_deploy(self) -> None:
        """Merge in place: keep nothing but :meth:`to_conv`. Idempotent."""
        if self.deploy:
            return
        conv = self.to_conv()
        for name in list(self._modules):
            delattr(self, name)
        for name in list(self._parameters):
            delattr(self, name)
        self.reparam_conv = conv

    def init_weights(self) -> None:
        """Apply the block's own ``init_cfg`` again, if it has one."""
        self._apply_init_cfg()
        for child in self.children():
            if hasattr(child, 'init_weights'):
                child.init_weights()
        self.is_init = True

    def _apply_init_cfg(self) -> None:
        # At construction, because many containers never call init_weights.
        if self.init_cfg:
            with self._own_rules():
                PORTS.initialize(self, self.init_cfg)

    @contextlib.contextmanager
    def _own_rules(self) -> Iterator[None]:
        self._initializing = True
        try:
            yield
        finally:
            self._initializing = False

    def apply(self, fn: Callable[[nn.Module], None]) -> nn.Module:
        """Apply a function to all submodules, as any module does.

        Only the host's initialisation rules stop here. mmengine matches them
        to layers by class name at any depth, and a rule such as "every norm's
        weight is 1" would undo what makes a block: its initial gammas.
        """
        if not self._initializing and PORTS.is_host_rule(fn):
            return self
        return super().apply(fn)

    def __getstate__(self) -> dict:
        # Copies and pickles compose their own kernel.
        return dict(self.__dict__, _cached_kernel=None)

    def named_children(self) -> Iterator[Tuple[str, nn.Module]]:
        """As of any module.

        Raises:
            ValueError: If mmcv's ``fuse_conv_bn`` asks, which would fuse the
                norm behind this block into a convolution before it.
        """
        if not self.deploy:
            PORTS.refuse_fusion(self, sys._getframe(1))
        return super().named_children()

    def extra_repr(self) -> str:
        spec = self.spec
        text = (
            f'{spec.in_channels}, {spec.out_channels}, '
            f'kernel_size={spec.kernel_size}, stride={spec.stride}'
        )
        defaults = dict(
            padding=(0, 0), dilation=(1, 1), groups=1, padding_mode='zeros'
        )
        for name, default in defaults.items():
            if getattr(spec, name) != default:
                text += f', {name}={getattr(spec, name)}'
        return text


def refuse_merged(block: nn.Module, missing: str) -> None:
    """Raise a ValueError if a block is merged and so has no ``missing``."""
    if block.deploy:
        raise ValueError(
            f'{type(block).__name__} is merged: it has no {missing}'
        )
