# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The base of blocks that sum branches (DBB paper, eq. 4)."""

from __future__ import annotations

import contextlib
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    ItemsView,
    List,
    Optional,
    Sequence,
    Tuple,
    Union,
    ValuesView,
)

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.base import ReparamConv2d, refuse_merged
from mmdbb.blocks.fast import fast_forward
from mmdbb.branches.base import (
    Branch,
    build_branch,
    is_served,
    leaf_dtype,
    named,
    split_branch_cfg,
)
from mmdbb.branches.norm import (
    build_branch_norm,
    norm_for,
    norm_scale_shift,
    run_norm,
)
from mmdbb.dimensions import per_channel
from mmdbb.geometry import ConvSpec
from mmdbb.modules import tensors_of
from mmdbb.recompute import is_compiling
from mmdbb.registry import BRANCHES
from mmdbb.transforms import KernelBias, add_branches, fuse_conv_bn

if TYPE_CHECKING:

    class Branches(nn.ModuleDict):
        """An ``nn.ModuleDict`` whose modules are branches."""

        def __getitem__(self, key: str) -> Branch: ...

        def items(self) -> ItemsView[str, Branch]: ...

        def values(self) -> ValuesView[Branch]: ...


BranchCfg = Union[str, dict]

#: Branches of one kernel of the full size, then a norm; the first there is
#: stands for the plain convolution.
DENSE_BRANCHES = ('kxk', 'orepa')


class BranchSumConv2d(ReparamConv2d):
    """A convolution that is trained as the sum of named branches.

    A preset (DBB, ACB, RepVGGConv) is a subclass with its own list of
    branches. Branches of a preset that do not support the geometry are left
    out; branches that the caller lists in ``branches`` raise instead.

    Args:
        args: Positional arguments of ``nn.Conv2d``: channels, kernel size,
            stride, padding, dilation, groups, bias, padding mode.
        branches: Names or configs of the branches; by default those of the
            preset. A name may occur more than once (the paper's "duplicate"
            block). The attribute ``branches`` has them by name; a second one
            of a name ends in ``_2``, and a kernel smaller than the block's
            says so (``kxk_k5_d2``: 5x5 taps, dilation 2).
        norm_cfg: Config of the norms, ``dict(type='BN')`` if None.
        shift: Whether norms subtract a mean and add a bias. If not, they only
            scale (:class:`~mmdbb.scale_norm.ScaleNorm`), and the merged
            convolution has a bias only with ``bias=True``.
        sum_norm: Whether a norm follows the sum; by default the preset
            decides.
        gamma_init: Start value of the gamma of the norm behind the sum. If
            there is no such norm, of the last norm in each branch. By default
            1.
        single_init: Whether the first branch starts with gamma 1 and all
            other branches with 0.
        kwargs: Arguments of ``nn.Conv2d`` as keywords, and ``deploy`` and
            ``init_cfg`` of :class:`ReparamConv2d`.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: (N, out_channels, H', W'), H' and W' as in ``nn.Conv2d``

    Raises:
        TypeError: If an argument has the wrong type, or a branch's config
            has unknown keys.
        ValueError: If a value is not allowed, or a branch does not support
            the geometry. The message says what is allowed.

    Examples:
        >>> conv = BranchSumConv2d(4, 8, 3, branches=['kxk', '1x1_avg'])
        >>> conv(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 8, 3, 4])
    """

    if TYPE_CHECKING:
        branches: Branches
        norm: Optional[_BatchNorm]

    #: Branches of the preset: names or configs.
    preset: Tuple[BranchCfg, ...] = ()

    #: Whether the preset has a norm after the sum.
    preset_sum_norm = False

    def __init__(
        self,
        *args,
        branches: Optional[Sequence[BranchCfg]] = None,
        norm_cfg: Optional[dict] = None,
        shift: bool = True,
        sum_norm: Optional[bool] = None,
        gamma_init: Optional[float] = None,
        single_init: bool = False,
        **kwargs,
    ) -> None:
        if not isinstance(shift, bool):
            raise TypeError(f'shift must be True or False, got {shift!r}')
        self._has_shift = shift  # which the base's constructor reads
        super().__init__(*args, **kwargs)
        if not shift and isinstance(norm_cfg or {}, dict):
            norm_cfg = dict(norm_cfg or dict(type='BN'), shift=False)
        self.left_out: List[str] = []
        if branches is None:
            branches = self._served_preset()
        elif isinstance(branches, (str, dict)) or not branches:
            raise TypeError(
                f'branches must be a list of branches, got {branches!r}'
            )
        if not branches:
            raise ValueError(
                f'{type(self).__name__} has no branch for {self.spec}; name '
                f'some by branches=[...], allowed: '
                f'{sorted(BRANCHES.module_dict)}'
            )
        if gamma_init is not None and single_init:
            raise ValueError('give gamma_init or single_init, not both')
        if self.deploy:
            return

        self._start = dict(gamma_init=gamma_init, single_init=single_init)
        wants_norm = self.preset_sum_norm if sum_norm is None else sum_norm
        self._build(branches, norm_cfg, wants_norm)
        self._apply_init_cfg()

    def _build(
        self,
        branches: Sequence[BranchCfg],
        norm_cfg: Optional[dict],
        sum_norm: bool,
    ) -> None:
        self.branches = nn.ModuleDict()  # type: ignore[assignment]
        for cfg in branches:
            branch = build_branch(cfg, self.spec, norm_cfg)
            name = key = split_branch_cfg(cfg)[0] + branch.suffix
            count = 1
            while key in self.branches:
                count += 1
                key = f'{name}_{count}'
            self.branches[key] = branch
        self.norm = (
            build_branch_norm(norm_cfg, self.out_channels, self.dims)
            if sum_norm
            else None
        )
        if next(self.parameters(), None) is None:
            raise ValueError(
                f'{type(self).__name__} with branches={list(branches)} has no '
                'parameter; give it a norm or a branch with a kernel'
            )
        norms = [self.norm, *(b.last_norm for b in self.branches.values())]
        has_shift = any(n is not None and n.bias is not None for n in norms)
        self._add_own_bias(self._wants_bias and not has_shift)

    def _apply_init_cfg(self) -> None:
        super()._apply_init_cfg()
        if self._start['gamma_init'] is not None:
            self.init_gamma(self._start['gamma_init'])
        if self._start['single_init']:
            self.single_init()

    @property
    def dense_branch(self) -> Optional[str]:
        """Name of the branch with a kernel of the full size and one norm.

        It is the one that can take any plain kernel. None if the block has no
        such branch.
        """
        dense = (n for n, b in self.branches.items() if b.is_dense)
        return next(dense, None)

    @classmethod
    def preset_for(cls, spec: ConvSpec) -> Sequence[BranchCfg]:
        """List the preset's branches for a geometry.

        Those that do not support the geometry are left out afterwards.

        Args:
            spec: Geometry of the convolution.
        """
        return cls.preset

    def preset_branches(self) -> Sequence[BranchCfg]:
        """The preset's branches; a subclass may look at its arguments."""
        return self.preset_for(self.spec)

    def _served_preset(self) -> Sequence[BranchCfg]:
        served = []
        for cfg in self.preset_branches():
            if is_served(cfg, self.spec):
                served.append(cfg)
            else:
                self.left_out.append(named(cfg))
        return served

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """Add a module; a SyncBN gives way to a norm without shift."""
        place = self._modules.get(name)
        super().add_module(name, norm_for(place, module))

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`ReparamConv2d.set_spec`."""
        if not self.deploy:
            for name, branch in self.branches.items():
                if not branch.supports(spec):
                    raise ValueError(
                        f'branch {name!r} needs {branch.requirement}, got '
                        f'{spec}'
                    )
            for branch in self.branches.values():
                branch.set_spec(spec)
                branch.refuse_changed_geometry()  # notes the new geometry
        super().set_spec(spec)

    def forward_train(self, x: Tensor) -> Tensor:
        """Sum the branches, in the fast way of :mod:`mmdbb.blocks.fast`.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        for branch in self.branches.values():
            branch.refuse_changed_geometry()
        return fast_forward(self, x)

    def _take_size(self, spec: ConvSpec) -> None:
        for branch in self.branches.values():
            branch.take_size(spec)

    def forward_branches(self, x: Tensor) -> Tensor:
        """Run each branch by itself, sum the outputs, and run the norm.

        Tests and verification take this as the reference for
        :meth:`forward`, which computes the same in faster ways.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        branches = self.at_size_of(x).branches
        outputs = [branch(x) for branch in branches.values()]
        y = outputs[0]
        for output in outputs[1:]:
            y = y + output
        if self.own_bias is not None:
            y = y + per_channel(self.own_bias.to(y.dtype), self.dims)
        return y if self.norm is None else run_norm(self.norm, y)

    def _compose(self, without: Sequence[Branch] = ()) -> KernelBias:
        for branch in self.branches.values():
            branch.refuse_changed_geometry()
        kernel, bias = add_branches(
            *[
                self.kernel_bias_of(branch)
                for branch in self.branches.values()
                if branch not in without
            ]
        )
        if self.own_bias is not None:
            bias = bias + self.own_bias
        merged = KernelBias(kernel, bias)
        if self.norm is None:
            return merged
        return fuse_conv_bn(merged, norm_scale_shift(self.norm))

    def kernel_bias_of(self, branch: Branch) -> KernelBias:
        """Merge one branch, without the norm behind the sum.

        Args:
            branch: One of the block's branches.

        Returns:
            KernelBias: Kernel (out, in / groups, kH, kW) and bias (out,), on
            the block's device and in its dtype.
        """
        if next(tensors_of(branch), None) is not None:
            return branch.equivalent_kernel_bias()
        # An identity without a norm has no tensor that says on which device
        # the block is. Copying from the CPU would wait for a GPU.
        device, dtype = next(tensors_of(self)).device, leaf_dtype(self)
        with contextlib.nullcontext() if is_compiling() else device:
            merged = branch.equivalent_kernel_bias()
        return KernelBias(*(t.to(device, dtype) for t in merged))

    @torch.no_grad()
    def init_gamma(self, value: float) -> None:
        """Set gamma of the norm behind the sum, or else of all branches.

        Args:
            value: The value of each gamma. In a branch it is the gamma of its
                last norm.

        Raises:
            ValueError: If such a norm is missing or has no weight
                (``affine=False``), or the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        norms: Dict[str, Optional[_BatchNorm]]
        if self.norm is not None:
            norms = {'the sum': self.norm}
        else:
            norms = {
                f'branch {name!r}': branch.last_norm
                for name, branch in self.branches.items()
            }
        self._set_gammas(norms, value)

    @staticmethod
    def _set_gammas(norms: dict, value: float) -> None:
        for name, norm in norms.items():
            if norm is None or norm.weight is None:
                reason = 'has affine=False' if norm else 'is left out'
                raise ValueError(
                    f'{name} has no gamma to initialise: its norm {reason}'
                )
        for norm in norms.values():
            norm.weight.fill_(value)

    @torch.no_grad()
    def single_init(self) -> None:
        """Give the first branch gamma 1, and all other branches 0.

        Raises:
            ValueError: If a branch's last norm is missing or has no weight
                (``affine=False``), or the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        names = {f'branch {k!r}': b for k, b in self.branches.items()}
        self._set_gammas({k: b.last_norm for k, b in names.items()}, 0.0)
        first: Any = next(iter(self.branches.values()))
        first.last_norm.weight.fill_(1.0)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.left_out:
            text += f', left_out={self.left_out}'
        return text
