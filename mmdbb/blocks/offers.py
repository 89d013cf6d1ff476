# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Blocks take plain weights from any state dict that is loaded.

Whoever loads a plain network's weights into a network with blocks, by
``load_state_dict``, mmengine's ``Pretrained`` or a Runner, offers each block
the entries of an ``nn.Conv2d``. A block that ignored them would stay random,
and where its stage is frozen, for good. So it starts as that convolution, or
raises. If it absorbed a norm, the norm's entries come to the place where that
norm was, which hands them on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from mmdbb.blocks.equivalent import MERGE_FIRST
from mmdbb.errors import UserError
from mmdbb.geometry import ConvSpec
from mmdbb.ports import PORTS
from mmdbb.transforms import KernelBias

#: Entries of a batch norm, those that every norm has to have first.
NORM_ENTRIES = (
    'running_mean',
    'running_var',
    'weight',
    'bias',
    'num_batches_tracked',
)

Entries = Dict[str, Tensor]


class NormEntries(NamedTuple):
    """The entries of a norm in a file, and what no file holds.

    Attributes:
        entries: Those of :data:`NORM_ENTRIES` that there are.
        eps: Added to the variance.
    """

    entries: Entries
    eps: float


class _Offer(NamedTuple):
    """What one of two, block and place of its norm, found in a state dict.

    Attributes:
        missing: The list of missing keys of the load, by which the other one
            knows that it is the same load.
        prefix: Beginning of the names of the entries.
        found: The plain convolution, or the norm's entries.
    """

    missing: List[str]
    prefix: str
    found: Any


class AbsorbedNorm(nn.Identity):
    """Stands where a block absorbed a norm, and remembers which block.

    It passes its input on. ``reparameterize`` leaves an ``nn.Identity``.

    Args:
        block: The block that does what the norm did.
        norm: The norm that was here.
        returns: Whether the plain network has that norm. The merged network
            of some backbones has none there, but a convolution with a bias.
    """

    #: Whether the norm that was here had a weight and a bias.
    affine = True

    def __init__(
        self,
        block: TakesPlainWeights,
        norm: nn.Module,
        returns: bool = True,
    ) -> None:
        super().__init__()
        self.returns = returns
        self.kind = type(norm).__name__
        self.affine = getattr(norm, 'affine', True)
        #: Added to the variance by the norm that was here.
        self.eps = getattr(norm, 'eps', 0.0)
        self._offers: Dict[str, _Offer] = {}
        self.belong_to(block)

    def belong_to(self, block: TakesPlainWeights) -> None:
        """Remember that a block does what the norm did.

        Args:
            block: The block.
        """
        # In tuples, because an attribute that is a module would be a child.
        self._block = (block,)
        block._absorbed = (self,)

    @property
    def block(self) -> TakesPlainWeights:
        """The block that absorbed the norm."""
        return self._block[0]

    def extra_repr(self) -> str:
        return f'{self.kind}, eps={self.eps}'

    def forward(self, input: Tensor) -> Tensor:
        """Pass the input on.

        A graph that torch.fx traces keeps this place, as it keeps a norm, so
        that a norm can come back here.

        Args:
            input: Anything.
        """
        x = input
        if not isinstance(x, torch.fx.Proxy):
            return x
        name = x.tracer.path_of_module(self)
        if not name or getattr(x.tracer, 'sees_through_places', False):
            return x
        return x.tracer.create_proxy('call_module', name, (x,), {})

    def __getattr__(self, name: str):
        if name in NORM_ENTRIES:
            raise AttributeError(
                f'the {self.kind} that was here is part of a '
                f'{type(self.block).__name__}, so it has no {name}: '
                f'{MERGE_FIRST}'
            )
        return super().__getattr__(name)

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _offers={})

    def _load_from_state_dict(self, state, prefix, *args) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        missing = args[-3]
        entries = {
            name: state[prefix + name]
            for name in NORM_ENTRIES
            if prefix + name in state
        }
        norm = _Offer(missing, prefix, entries)
        plain = self._taken('plain', missing)
        if plain is None:
            self._offers['norm'] = norm  # the block may come later
        else:
            self._start(plain, norm, args)

    def norm_for(
        self, args: tuple, plain: KernelBias
    ) -> Optional[NormEntries]:
        """The norm's entries, if this load found them before the block.

        Args:
            args: Last arguments of the block's ``_load_from_state_dict``.
            plain: What the block was offered.
        """
        offer = self._taken('norm', args[-3])
        return None if offer is None else self._used(offer, args, plain)

    def wait(self, missing: List[str], prefix: str, plain: KernelBias) -> None:
        """Keep what a block was offered, until this load comes to the norm.

        Args:
            missing: The load's list of missing keys.
            prefix: Beginning of the names of the block's entries.
            plain: The plain convolution. Its bias is None where the weights
                have none.
        """
        self._offers['plain'] = _Offer(missing, prefix, plain)

    def _taken(self, kind: str, missing: List[str]) -> Optional[_Offer]:
        offer = self._offers.pop(kind, None)
        same_load = offer is not None and offer.missing is missing
        return offer if same_load else None

    def _start(self, plain: _Offer, norm: _Offer, args: tuple) -> None:
        found = self._used(norm, args, plain.found)
        if found is None:
            return
        block, name = self.block, plain.prefix[:-1]
        entries = _started(block, name, plain.found, found)
        own = block.state_dict(keep_vars=True)
        for entry, value in entries.items():
            own[entry].data.copy_(value)

    def _used(
        self, offer: _Offer, args: tuple, plain: KernelBias
    ) -> Optional[NormEntries]:
        """Tell the load that it used a norm's entries; None if it did not."""
        if not (offer.found or self.returns):
            return None
        missing, unexpected, errors = args[-3:]
        if not offer.found and plain.bias is None:
            raise UserError(
                'the weights hold a plain convolution for a '
                f'{type(self.block).__name__} that does the work of the '
                f'{self.kind} at {offer.prefix[:-1]}, too, but no entry of '
                'that norm: load both, or neither'
            )
        channels = (self.block.out_channels,)
        names = {offer.prefix + name for name in offer.found}
        missing.extend(
            offer.prefix + name
            for name in NORM_ENTRIES[: 4 if self.affine else 2]
            if name not in offer.found
        )
        unexpected[:] = [name for name in unexpected if name not in names]
        found = len(errors)
        for name, value in offer.found.items():
            if name != NORM_ENTRIES[-1] and tuple(value.shape) != channels:
                errors.append(_size(offer.prefix + name, value, channels))
        if len(errors) > found:
            return None
        return NormEntries(offer.found, self.eps)


class TakesPlainWeights(nn.Module):
    """Base of the blocks: entries of a plain convolution make it start so.

    A state dict with the block's own entries loads as into any module.
    """

    if TYPE_CHECKING:
        spec: ConvSpec
        out_channels: int
        _wants_bias: bool

    #: The place of the norm that the block absorbed, in a tuple.
    _absorbed: Tuple[AbsorbedNorm, ...] = ()

    def _load_from_state_dict(self, state, prefix, *args) -> None:
        if f'{prefix}weight' in state:
            self._take_plain(state, prefix, args)
        elif f'{prefix}reparam_conv.weight' in state:
            self._refuse_merged(prefix)
        super()._load_from_state_dict(state, prefix, *args)

    def _refuse_merged(self, prefix: str) -> None:
        """Raise unless the block is merged, as the one in the weights is."""
        if 'reparam_conv' not in self._modules:
            raise UserError(
                f'the weights hold a merged block at {prefix[:-1]} '
                f'({prefix}reparam_conv.weight), but the network has a '
                f'{type(self).__name__} with branches, which would stay as '
                'they are; load the weights from before merging, or call '
                'switch_to_deploy() on the block first'
            )

    def _take_plain(self, state: Entries, prefix: str, args: tuple) -> None:
        """Turn offered plain entries into the block's own, in the dict."""
        own = self.state_dict()
        offered = {n[len(prefix) :] for n in state if n.startswith(prefix)}
        branches = {n for n in own if n != 'bias'}
        needed = {n for n in branches if not n.endswith(NORM_ENTRIES[-1])}
        if 'weight' in own or needed <= offered:
            return
        if branches & offered:
            raise UserError(
                f'the weights hold a plain convolution for {prefix[:-1]} '
                f'({prefix}weight) and some of the entries of its branches, '
                'but not all; remove one or the other'
            )
        missing, _, errors = args[-3:]
        kernel = state.pop(f'{prefix}weight')
        bias: Any = state.pop(f'{prefix}bias', None)
        entries = {}
        shape, channels = self.spec.weight_shape, (self.out_channels,)
        if tuple(kernel.shape) != shape:
            errors.append(_size(f'{prefix}weight', kernel, shape))
        elif bias is not None and tuple(bias.shape) != channels:
            errors.append(_size(f'{prefix}bias', bias, channels))
        else:
            place = self._absorbed[0] if self._absorbed else None
            if bias is None and self._wants_bias and place is None:
                missing.append(f'{prefix}bias')
            bias = None if bias is None else bias.detach()
            plain = KernelBias(kernel.detach(), bias)
            norm = None if place is None else place.norm_for(args, plain)
            if place is not None and norm is None:
                place.wait(missing, prefix, plain)
            entries = _started(self, prefix[:-1], plain, norm)
        for name, value in own.items():
            value = entries.get(name, value).to(value)
            state[prefix + name] = value


def _started(
    block: nn.Module,
    name: str,
    plain: KernelBias,
    norm: Optional[NormEntries],
) -> Entries:
    """The entries with which a block equals what it was offered."""
    try:
        return PORTS.start_plain(block, plain, norm)
    except ValueError as error:
        raise UserError(
            f'the weights hold a plain convolution for {name or "the block"}, '
            f'where the network has a {type(block).__name__}, which cannot '
            f'start as it: {error}'
        ) from error


def _size(name: str, value: Tensor, wanted: Tuple[int, ...]) -> str:
    """The words that torch has for a tensor of another shape."""
    return (
        f'size mismatch for {name}: copying a param with shape '
        f'{tuple(value.shape)} from checkpoint, the shape in current model is '
        f'{tuple(wanted)}.'
    )
