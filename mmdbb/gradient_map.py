# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Gradients of a kernel, as those of scaled branches add up to them.

See :mod:`mmdbb.repopt` for the equation.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from mmdbb.blocks.linear import LinearBranch

#: Key of the note in an optimizer's groups, and in a file of scales.
NOTE = 'branch_scales'


class GradientMap(NamedTuple):
    """The map from a kernel's gradient to that of its scaled branches.

    Attributes:
        factor: What multiplies the gradient, tap by tap: of a shape that
            broadcasts to the kernel's.
        mixes: Pairs of squared scales (out, 1, 1) and matrices (taps, taps),
            for branches that spread a weight over several taps.
        patterns: Kernels (out, in / groups, kH, kW) of branches without a
            weight that have several taps in a channel.
    """

    factor: Tensor
    mixes: List[Tuple[Tensor, Tensor]]
    patterns: List[Tensor]

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        linear: List[LinearBranch],
        scales: Dict[str, Tensor],
    ) -> GradientMap:
        """Make the map of a convolution.

        Args:
            conv: The convolution.
            linear: Its linear branches.
            scales: Their scales, each (out,).
        """
        out, inside, *size = conv.weight.shape
        factor = torch.zeros(out, 1, *size, dtype=torch.float64)
        mixes, patterns = [], []
        for branch in linear:
            if branch.size is None:
                pattern = branch.basis
                if (pattern != 0).flatten(1).sum(1).max() <= 1:
                    factor = factor + pattern.square()
                else:
                    patterns.append(pattern)
                continue
            square = scales[branch.key].double().square().reshape(-1, 1, 1)
            matrix = branch.basis.t() @ branch.basis
            diagonal = matrix.diagonal()
            if torch.equal(matrix, torch.diag(diagonal)):
                factor = factor + (square * diagonal).reshape(out, 1, *size)
            else:
                mixes.append((square, matrix))
        return cls(factor, mixes, patterns)

    def equals(self, other: GradientMap) -> bool:
        """Whether another map is the same, number by number."""
        mine, its = self._tensors(), other._tensors()
        return len(mine) == len(its) and all(map(torch.equal, mine, its))

    def _tensors(self) -> List[Tensor]:
        mixed = [tensor for pair in self.mixes for tensor in pair]
        return [self.factor, *mixed, *self.patterns]

    def like(self, grad: Tensor) -> GradientMap:
        """The map in a gradient's precision, on its device."""
        return GradientMap(
            self.factor.to(grad),
            [(a.to(grad), b.to(grad)) for a, b in self.mixes],
            [pattern.to(grad) for pattern in self.patterns],
        )

    def __call__(self, grad: Tensor) -> Tensor:
        """Map a gradient, (out, in / groups, kH, kW); it is not changed."""
        result = grad * self.factor
        for square, matrix in self.mixes:
            mixed = (grad.flatten(2) @ matrix) * square
            result = result + mixed.reshape(grad.shape)
        for pattern in self.patterns:
            along = (grad * pattern).flatten(1).sum(1)
            ones = [1] * (grad.dim() - 1)
            result = result + pattern * along.reshape(-1, *ones)
        return result


class Scaling:
    """Maps gradients for the time of an optimizer's step.

    Args:
        optimizer: The optimizer, whose hooks hold this object.
        maps: Weights of convolutions -> the maps of their gradients.
        digest: Tells these scales from others; the optimizer's groups note
            it, and so does its ``state_dict``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        maps: Dict[nn.Parameter, GradientMap],
        digest: str,
    ) -> None:
        self.maps, self.digest = maps, digest
        self.before: Dict[nn.Parameter, Optional[Tensor]] = {}
        optimizer.defaults[NOTE] = digest
        for group in optimizer.param_groups:
            group[NOTE] = digest
        optimizer.register_step_pre_hook(self.map_gradients)
        optimizer.register_step_post_hook(self.put_back)

    def map_gradients(
        self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> Optional[Tuple[tuple, dict]]:
        """Map all gradients, or those that a closure will compute."""
        for group in optimizer.param_groups:
            if group.get(NOTE) != self.digest:
                raise ValueError(
                    'the state that was loaded into the optimizer was '
                    'trained with other scales of branches, or with none: '
                    'resume with the file of scales of that training'
                )
        own, *rest = args
        closure = rest[0] if rest else kwargs.get('closure')
        if closure is None:
            self._map_now()
            return None

        def mapped(*inputs: Any) -> Any:
            loss = closure(*inputs)
            self._map_now()
            return loss

        if rest:
            return (own, mapped, *rest[1:]), kwargs
        return args, dict(kwargs, closure=mapped)

    @torch.no_grad()
    def _map_now(self) -> None:
        self.before = {}
        for weight, gradient_map in self.maps.items():
            grad = weight.grad
            if grad is None:
                continue
            factor = gradient_map.factor
            if (factor.device, factor.dtype) != (grad.device, grad.dtype):
                gradient_map = self.maps[weight] = gradient_map.like(grad)
            self.before[weight] = grad
            weight.grad = gradient_map(grad)

    def put_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Give the parameters their gradients back."""
        for weight, grad in self.before.items():
            weight.grad = grad
        self.before = {}
