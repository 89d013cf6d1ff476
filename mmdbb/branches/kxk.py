# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branch ``kxk``: a convolution of the block's kernel size, or a smaller.

The smaller and the dilated ones are those of RepLKNet (Ding et al., CVPR 2022,
sec. 3, guideline 3, https://arxiv.org/abs/2203.06717) and of UniRepLKNet's
Dilated Reparam Block (Ding et al., CVPR 2024, sec. 3.2,
https://arxiv.org/abs/2311.15599).
"""

from __future__ import annotations

from typing import Optional, Sequence, Union

from torch import Tensor

from mmdbb.branches.base import ConvNormBranch, kernel_of
from mmdbb.geometry import ConvSpec, IntPair
from mmdbb.registry import BRANCHES


@BRANCHES.register_module(name='kxk')
class KxK(ConvNormBranch):
    """A convolution, by default with the block's own geometry, and a norm.

    With a kernel of its own it stands around the middle of the block's
    kernel, and merges into it.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        norm: Whether a norm follows the convolution.
        kernel_size: Height and width of the branch's kernel in taps, or one
            number for both; by default the block's.
        dilation: Distance between two neighbouring taps of this kernel, in
            taps of the block's kernel; one number or two. From the first to
            the last tap there are ``dilation * (kernel_size - 1) + 1`` taps.
            They must be at most as many as the block's kernel has, and both
            numbers odd or both even.
    """

    requirement = (
        "a kernel that ends inside the block's and has the same middle: "
        "dilation * (kernel_size - 1) + 1 must be at most the block's "
        'kernel_size, and both odd or both even'
    )

    def __init__(
        self,
        spec: ConvSpec,
        norm_cfg: Optional[dict] = None,
        norm: bool = True,
        kernel_size: Union[int, IntPair, None] = None,
        dilation: Union[int, IntPair] = 1,
    ) -> None:
        size, self.tap_dilation = _inner(spec, kernel_size, dilation)
        self._size = size
        super().__init__(spec, norm_cfg, norm)

    @classmethod
    def supports(
        cls,
        spec: ConvSpec,
        kernel_size: Union[int, IntPair, None] = None,
        dilation: Union[int, IntPair] = 1,
    ) -> bool:
        return spec.has_room_for(*_inner(spec, kernel_size, dilation))

    # These two are constants of all other branches.
    @property
    def is_dense(self) -> bool:  # type: ignore[override]
        return self._size == self.spec.kernel_size

    @property
    def suffix(self) -> str:  # type: ignore[override]
        """Says size and dilation of a kernel of its own: ``_k5_d2``."""
        if self.is_dense:
            return ''
        text = f'_k{_short(self._size)}'
        dilation = self._dilation(self.spec)
        if set(dilation) == {1}:
            return text
        return f'{text}_d{_short(dilation)}'

    def size(self, spec: ConvSpec) -> IntPair:
        return self._size

    @property
    def kernel(self) -> Tensor:
        """Shape (out, in / groups, kH, kW)."""
        return kernel_of(self.conv.weight, self.spec)


def _short(numbers: Sequence[int]) -> str:
    """One number where all are equal, else all of them, as in ``3x1``."""
    different = numbers if len(set(numbers)) > 1 else numbers[:1]
    return 'x'.join(map(str, different))


def _inner(spec: ConvSpec, kernel_size, dilation) -> tuple:
    size = spec.kernel_size if kernel_size is None else kernel_size
    return spec.inner_kernel(size, dilation)
