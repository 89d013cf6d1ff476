# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The block whose scales RepOptimizer searches: a sum of scaled branches.

Ding et al., "Re-parameterizing Your Optimizers rather than Architectures",
ICLR 2023, sec. 3.1 and 3.2 (https://arxiv.org/abs/2205.15242): the
``LinearAddBlock`` of the paper's code, for the branches of any block.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor, nn

from mmdbb.blocks.build import register_conv_layer
from mmdbb.blocks.composed import ComposedKernelConv2d
from mmdbb.blocks.linear import (
    BranchCfg,
    LinearBranch,
    LinearBranches,
    linear_branches,
)
from mmdbb.geometry import ConvSpec, convolve
from mmdbb.kernels import ComposedKernel
from mmdbb.kernels.base import empty_kernel


@register_conv_layer('LinearAdd')
class LinearAddConv(ComposedKernelConv2d):
    """The branches of a block, each with a scale per channel, and no norm.

    The branches' norms are replaced by scales, which are trained. One norm
    follows the sum; the network puts it behind the block, as behind any
    convolution. With ``train_scales=False`` the scales are constant (CSLA in
    the paper). A branch without a weight (the identity) has its scale as its
    weight, so that one is trained in any case. A sum of scaled branches is
    linear, so that the block runs one convolution in training too.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        block: Config of the block whose branches are summed,
            ``dict(type='RepVGGConv')`` by default. Branches that are not
            linear, such as DBB's ``1x1_kxk``, are left out.
        branches: Names or configs of the branches, in place of the block's.
        scale_init: Start value of the scales, but for branches without a
            weight, whose scale starts at 1. The paper's code starts the i-th
            block of a stage, from 0 on, with the root of 2 / i, and the
            first with 1.
        train_scales: Whether the scales are trained.
        kwargs: The arguments of ``nn.Conv2d`` as keywords, and ``deploy``,
            ``init_cfg`` and ``single_init`` of the base classes.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: (N, out_channels, H', W'), H' and W' as in ``nn.Conv2d``

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``block`` sums no branches, a listed branch is not
            linear, or ``scale_init`` is not a positive number.

    Examples:
        >>> conv = LinearAddConv(4, 4, 3, padding=1)
        >>> sorted(conv.generator.scales)
        ['1x1', 'identity', 'kxk']
        >>> conv(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 4, 5, 6])
    """

    if TYPE_CHECKING:
        generator: LinearAddKernel

    def __init__(
        self,
        *args,
        block: Optional[dict] = None,
        branches: Optional[Sequence[BranchCfg]] = None,
        scale_init: float = 1.0,
        train_scales: bool = True,
        **kwargs,
    ) -> None:
        if not isinstance(train_scales, bool):
            raise TypeError(
                f'train_scales must be True or False, got {train_scales!r}'
            )
        is_number = isinstance(scale_init, Real) and scale_init is not True
        if not is_number or not 0 < scale_init < math.inf:
            raise ValueError(
                f'scale_init must be a positive number, got {scale_init!r}'
            )
        self._asked: Dict[str, Any] = dict(block=block, branches=branches)
        #: Names of the branches that are left out.
        self.left_out: List[str] = []

        def build(spec: ConvSpec) -> LinearAddKernel:
            return LinearAddKernel(
                spec, self._linear(spec), float(scale_init), train_scales
            )

        super().__init__(build, *args, **kwargs)

    def _linear(self, spec: ConvSpec) -> LinearBranches:
        found = linear_branches(spec, **self._asked)
        self.left_out = found.left_out
        return found

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`ReparamConv2d.set_spec`."""
        if not self.deploy:
            found = self._linear(spec).branches
            keys = [branch.key for branch in found]
            if keys != list(self.generator.scales):
                raise ValueError(
                    f'branches {list(self.generator.scales)} do not serve '
                    f'{spec}; those that do are {keys}'
                )
            self.generator.set_maps(found)
        super().set_spec(spec)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if not self.deploy:
            text += f', branches={list(self.generator.scales)}'
        return text


class LinearAddKernel(ComposedKernel):
    """The sum of linear branches, each times a scale per output channel.

    ``weights`` and ``scales`` hold the parameters by the branches' names. A
    branch without a weight has a scale only.

    Args:
        spec: Geometry of the convolution.
        linear: Its linear branches.
        scale_init: Start value of the scales of branches with a weight.
        train_scales: Whether these scales are trained.
    """

    def __init__(
        self,
        spec: ConvSpec,
        linear: LinearBranches,
        scale_init: float = 1.0,
        train_scales: bool = True,
    ) -> None:
        super().__init__(spec)
        self.scale_init = scale_init
        self.weights, self.scales = nn.ParameterDict(), Scales()
        out, inside = spec.kernel_shape[:2]
        for branch in linear.branches:
            if branch.size is not None:
                self.weights[branch.key] = empty_kernel(
                    out, inside, *branch.size
                )
            trained = train_scales or branch.size is None
            self.scales.add(branch.key, torch.empty(out), trained)
        self.set_maps(linear.branches)
        self.reset_parameters()

    def set_maps(self, branches: Sequence[LinearBranch]) -> None:
        """Take the maps from weights to kernels.

        Args:
            branches: One for each scale, in the same order.
        """
        self.branches = list(branches)
        for i, branch in enumerate(branches):
            basis = None
            if not branch.is_dense:
                basis = branch.basis.to(self.scales[branch.key])
            # A constant, not in checkpoints: the config says what it is.
            self.register_buffer(f'basis{i}', basis, persistent=False)

    def _apply(self, fn: Callable, *args, **kwargs) -> LinearAddKernel:
        # A ninth is not exact in single precision, nor after double().
        super()._apply(fn, *args, **kwargs)
        self.set_maps(self.branches)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.Conv2d`` does; set scales and constants."""
        for weight in self.weights.values():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for i, branch in enumerate(self.branches):
            has_weight = branch.size is not None
            self.scales[branch.key].fill_(
                self.scale_init if has_weight else 1.0
            )
            basis = getattr(self, f'basis{i}')
            if basis is not None:
                basis.copy_(branch.basis)

    def branch_kernels(self) -> Dict[str, Tensor]:
        """The scaled kernel of each branch, (out, in / groups, kH, kW)."""
        return {
            key: kernel * scale.reshape(-1, *[1] * (kernel.dim() - 1))
            for key, kernel, scale in self._parts()
        }

    def compose(self) -> Tensor:
        """Compose the kernel, (out, in / groups, kH, kW)."""
        first, *others = self.branch_kernels().values()
        return sum(others, first)

    def forward_branches(self, x: Tensor) -> Tensor:
        """See :meth:`ComposedKernel.forward_branches`."""
        outputs = []
        for _, kernel, scale in self._parts():
            y = convolve(x, kernel, None, self.spec)
            # In half precision where autocast says so, as norms compute.
            scale = scale.to(y.dtype).reshape(1, -1, *[1] * (y.dim() - 2))
            outputs.append(y * scale)
        return sum(outputs[1:], outputs[0])

    def _parts(self) -> Iterator[Tuple[str, Tensor, Tensor]]:
        """Name, unscaled kernel and scale of each branch."""
        for i, branch in enumerate(self.branches):
            basis, key = getattr(self, f'basis{i}'), branch.key
            kernel = basis
            if branch.size is not None:
                kernel = self.weights[key]
                if basis is not None:
                    kernel = kernel.flatten(2) @ basis
                    kernel = kernel.reshape(self.spec.kernel_shape)
            yield key, kernel, self.scales[key]

    @torch.no_grad()
    def init_gamma(self, value: float) -> None:
        """Set the scales of all branches to one value."""
        for scale in self.scales.values():
            scale.fill_(value)

    @torch.no_grad()
    def single_init(self) -> None:
        """Give the first dense branch scale 1, and all others 0."""
        first = self._dense()
        self.init_gamma(0.0)
        self.scales[first].fill_(1.0)

    @torch.no_grad()
    def start_as_(
        self, kernel: Tensor, share: float, dtype: torch.dtype
    ) -> None:
        """Equal a given kernel; see :func:`mmdbb.plain.kernels.start_as_`.

        Args:
            kernel: The plain kernel, (out, in / groups, kH, kW).
            share: Size of the sum of the other branches, relative to it.
            dtype: Precision to which scales are rounded first.

        Raises:
            ValueError: If no branch has a kernel of the full size.
        """
        dense = self._dense()
        self.scales[dense].zero_()
        own = self.compose().flatten(1).norm(dim=1)
        wanted = kernel.flatten(1).norm(dim=1)
        factor = torch.where(own > 0, share * wanted / own, 1.0)
        for scale in self.scales.values():
            scale.copy_((scale * factor).to(dtype))
        self.weights[dense].copy_(kernel - self.compose())
        self.scales[dense].fill_(1.0)

    def _dense(self) -> str:
        for branch in self.branches:
            if branch.is_dense:
                return branch.key
        raise ValueError(
            f'none of the branches {list(self.scales)} has a kernel of the '
            "full size, as 'kxk' has"
        )


class Scales(nn.Module):
    """Scales by the names of branches; constant ones are buffers.

    As buffers, no ``requires_grad_`` and no optimizer reaches them.
    """

    def add(self, key: str, scale: Tensor, trained: bool) -> None:
        """Add a scale (out,)."""
        if trained:
            self.register_parameter(key, nn.Parameter(scale))
        else:
            self.register_buffer(key, scale)
        # In the order of the branches, which neither dict has alone.
        self._keys = [*getattr(self, '_keys', ()), key]

    def keys(self) -> List[str]:
        """The branches' names, in their order."""
        return list(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __getitem__(self, key: str) -> Tensor:
        return getattr(self, key)

    def values(self) -> List[Tensor]:
        """The scales, each (out,), in the branches' order."""
        return [self[key] for key in self._keys]
