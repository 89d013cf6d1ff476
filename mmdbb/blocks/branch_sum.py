# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A convolution trained as the sum of branches (DBB paper, eq. 4)."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import ReparamConv2d, refuse_merged
from mmdbb.blocks.fast import fast_forward
from mmdbb.branches.base import (
    Branch,
    build_branch,
    leaf_dtype,
    split_branch_cfg,
)
from mmdbb.branches.norm import (
    build_branch_norm,
    norm_scale_shift,
    run_norm,
)
from mmdbb.geometry import ConvSpec
from mmdbb.modules import tensors_of
from mmdbb.registry import BRANCHES
from mmdbb.transforms import KernelBias, add_branches, fuse_conv_bn

BranchCfg = Union[str, dict]

#: Branches of one kernel of the full size, then a norm; the first there is
#: stands for the plain convolution.
DENSE_BRANCHES = ('kxk', 'orepa')


class BranchSumConv2d(ReparamConv2d):
    """The sum of named branches.

    A preset (DBB, ACB, RepVGGConv) is a subclass with its own list of
    branches. A preset leaves out what cannot serve a geometry; a branch that
    was asked for by ``branches`` raises instead.

    Args:
        args: As :class:`ReparamConv2d`, keywords too.
        branches: Names or configs of the branches; by default the preset's.
            A name may stand more than once (the paper's "duplicate" block).
        norm_cfg: Config of the norms, ``dict(type='BN')`` if None.
        sum_norm: Whether a norm follows the sum; by default the preset's.
        gamma_init: Start value of the weight of the norm after the sum, or
            where there is none of each branch's last norm; by default 1.
        single_init: Whether the first branch starts with 1 and the others
            with 0.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: (N, out_channels, H', W') as of ``nn.Conv2d``

    Raises:
        TypeError: If an argument or a branch's config has unknown keys.
        ValueError: If a value is not allowed or a branch cannot serve the
            geometry; the message says what is allowed.

    Examples:
        >>> conv = BranchSumConv2d(4, 8, 3, branches=['kxk', '1x1_avg'])
        >>> conv(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 8, 3, 4])
    """

    #: The preset: names or configs.
    preset: Tuple[BranchCfg, ...] = ()

    #: Whether the preset has a norm after the sum.
    preset_sum_norm = False

    def __init__(
        self,
        *args,
        branches: Optional[Sequence[BranchCfg]] = None,
        norm_cfg: Optional[dict] = None,
        sum_norm: Optional[bool] = None,
        gamma_init: Optional[float] = None,
        single_init: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.left_out = []
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

        self.branches = nn.ModuleDict()
        for cfg in branches:
            name = key = split_branch_cfg(cfg)[0]
            count = 1
            while key in self.branches:
                count += 1
                key = f'{name}_{count}'
            self.branches[key] = build_branch(cfg, self.spec, norm_cfg)

        wants_norm = self.preset_sum_norm if sum_norm is None else sum_norm
        self.norm = (
            build_branch_norm(norm_cfg, self.out_channels)
            if wants_norm
            else None
        )
        if next(self.parameters(), None) is None:
            raise ValueError(
                f'{type(self).__name__} with branches={list(branches)} has no '
                'parameter; give it a norm or a branch with a kernel'
            )
        norms = [self.norm, *(b.last_norm for b in self.branches.values())]
        has_shift = any(n is not None and n.affine for n in norms)
        wants_bias = self._wants_bias and not has_shift
        self.register_parameter(
            'bias',
            nn.Parameter(torch.zeros(self.out_channels))
            if wants_bias
            else None,
        )
        self._apply_init_cfg()
        if gamma_init is not None:
            self.init_gamma(gamma_init)
        if single_init:
            self.single_init()

    @property
    def dense_branch(self) -> Optional[str]:
        """Name of the branch with a kernel of the full size and one norm.

        It is the one that can take any plain kernel. None if the block has no
        such branch.
        """
        return next((n for n in DENSE_BRANCHES if n in self.branches), None)

    @classmethod
    def preset_for(cls, spec: ConvSpec) -> Sequence[BranchCfg]:
        """The preset for a geometry, before asking the branches."""
        return cls.preset

    def _served_preset(self) -> Sequence[BranchCfg]:
        served = []
        for cfg in self.preset_for(self.spec):
            name, _ = split_branch_cfg(cfg)
            if BRANCHES.get(name).supports(self.spec):
                served.append(cfg)
            else:
                self.left_out.append(name)
        return served

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
                branch.refuse_changed_geometry()  # notes what it is now
        super().set_spec(spec)

    def forward_train(self, x: Tensor) -> Tensor:
        """The sum of the branches, the fast way (:mod:`mmdbb.blocks.fast`)."""
        for branch in self.branches.values():
            branch.refuse_changed_geometry()
        return fast_forward(self, x)

    def forward_branches(self, x: Tensor) -> Tensor:
        """The sum of the branches and its norm, computed literally.

        It stays the reference for tests and for verification, however
        :meth:`forward` computes the same.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        outputs = [branch(x) for branch in self.branches.values()]
        y = outputs[0]
        for output in outputs[1:]:
            y = y + output
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).reshape(-1, 1, 1)
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
        if self.bias is not None:
            bias = bias + self.bias
        merged = KernelBias(kernel, bias)
        if self.norm is None:
            return merged
        return fuse_conv_bn(merged, norm_scale_shift(self.norm))

    def kernel_bias_of(self, branch: Branch) -> KernelBias:
        """A branch's kernel and bias, before the norm of the sum.

        Args:
            branch: One of the block's branches.

        Returns:
            KernelBias: Kernel (out, in / groups, kH, kW) and bias (out,), on
            the block's device and in its dtype.
        """
        merged = branch.equivalent_kernel_bias()
        if next(tensors_of(branch), None) is not None:
            return merged
        # An identity without a norm does not know where the block is.
        device, dtype = next(tensors_of(self)).device, leaf_dtype(self)
        return KernelBias(*(t.to(device, dtype) for t in merged))

    @torch.no_grad()
    def init_gamma(self, value: float) -> None:
        """Set the weight of the norm after the sum, or of each branch's last.

        Raises:
            ValueError: If such a norm is missing or has no weight
                (``affine=False``), or the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
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
        """Start as the first branch alone: gammas 1, 0, 0, ...

        Raises:
            ValueError: As :meth:`init_gamma`.
        """
        refuse_merged(self, 'gammas to initialise')
        names = {f'branch {k!r}': b for k, b in self.branches.items()}
        self._set_gammas({k: b.last_norm for k, b in names.items()}, 0.0)
        next(iter(self.branches.values())).last_norm.weight.fill_(1.0)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.left_out:
            text += f', left_out={self.left_out}'
        return text
