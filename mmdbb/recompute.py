# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Computing again in the backward pass, and what that must not change.

What is computed again must be what the forward pass computed, although
buffers have moved since: a head that is shared over levels runs several times
before its one backward pass, and a compiler orders reads and writes as it
likes. So :func:`again` takes every value as an argument, and where a user
checkpoints a segment, :func:`from_forward` gives a value back that the
segment computed in its forward pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from types import FrameType
from typing import Callable, Deque, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.modules import shadow

# torch 2.1 has no torch.compiler.is_compiling, 2.6 no is_exporting.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)

# Modules whose frames mean that the engine has called what is above them.
_ENGINE = ('torch.autograd', 'torch.autograd.graph')


def is_recording() -> bool:
    """Whether torch writes down the operations to run them without us.

    That is compiling and exporting, and the older tracing of
    ``torch.jit.trace``, whose shapes are no numbers.
    """
    return is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work.

    Both ask more of an ``autograd.Function`` than a backward pass, and see
    through no kept value.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_recomputing() -> bool:
    """Whether this is a checkpointed segment, run again for its gradient.

    A forward pass that a hook starts during the backward pass is a new one:
    the engine called it, not a checkpoint.
    """
    if is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    for frame in _frames():
        if _is_checkpoint(frame, 'backward'):
            return True
        if frame.f_globals.get('__name__') in _ENGINE:
            return False
    return False


def _segments() -> List[int]:
    """The checkpointed segments that run now, the innermost first.

    Each by the identity of what its checkpoint keeps from the forward to the
    backward pass.
    """
    kept = []
    for frame in _frames():
        if _is_checkpoint(frame, 'forward') or _is_checkpoint(
            frame, 'backward'
        ):
            values = frame.f_locals
            generator = getattr(values.get('gen'), 'gi_frame', None)
            if generator is not None:  # torch's, not reentrant, forwards
                values = generator.f_locals
            for name in ('ctx', 'new_frame', 'frame'):
                kept.append(values.get(name))
    # Frames of a checkpoint that keep nothing still say that there is one.
    found = [id(value) for value in kept if value is not None]
    return found or ([0] if kept else [])


def _is_checkpoint(frame: FrameType, method: str) -> bool:
    """Whether a frame is of a checkpoint, torch's or another library's.

    Others write a ``torch.autograd.Function``, whose methods take ``ctx``.
    """
    if frame.f_globals.get('__name__') == 'torch.utils.checkpoint':
        return True
    code = frame.f_code
    return (
        code.co_name == method
        and code.co_varnames[:1] == ('ctx',)
        and code is not _Again.forward.__code__  # it is given all values
    )


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


# --------------------------------------------------- running a function again


def again(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    module: Optional[nn.Module] = None,
) -> Tensor:
    """Run a function whose inside is computed again, not kept.

    Its gradients can be differentiated again. A tensor that was changed in
    place before the backward pass raises there, as one that autograd keeps.

    Args:
        function: From ``tensors`` to one tensor. It computes the same at each
            call, and reads no buffer of a norm. With ``module``, its first
            argument is that module, or one like it.
        tensors: What it is differentiated by, and what it is called with.
        module: A module whose parameters, weights that hooks computed, and
            buffers other than those of norms, the function also reads.

    Returns:
        Tensor: What the function returns.
    """
    places = {} if module is None else dict(_places(module))
    count, read = len(tensors), list(places.values())

    def run(*values: Tensor) -> Tensor:
        if module is None:
            return function(*values)
        like, now = module, dict(zip(places, values[count:]))
        if any(now[place] is not tensor for place, tensor in places.items()):
            like = shadow(
                module,
                lambda owner, name, t: now.get((id(owner), name), t),
            )
        return function(like, *values[:count])

    if (
        is_compiling()
        or not torch.is_grad_enabled()
        or not any(t.requires_grad for t in (*tensors, *read))
    ):
        return run(*tensors, *read)
    device = (*tensors, *read)[0].device.type
    return _Again.apply(run, device, *tensors, *read)


def _places(
    module: nn.Module,
) -> Iterator[Tuple[Tuple[int, str], Tensor]]:
    """Where a module's tensors are, by submodule and name, and they."""
    for each in module.modules():
        read = [each._parameters]
        if not isinstance(each, _BatchNorm):
            read.append(each._buffers)
        # As hooks leave them that compute a weight, and replicas have them.
        attributes = vars(each).items()
        read.append(
            {
                name: value
                for name, value in attributes
                if isinstance(value, Tensor) and value.requires_grad
            }
        )
        for tensors in read:
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield (id(each), name), tensor


class _Again(torch.autograd.Function):
    """Keeps its inputs alone; the gradient is that of a second run."""

    @staticmethod
    def forward(ctx, function, device, *tensors):
        ctx.function = function
        ctx.autocast = device, autocast_dtype(device)
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad(), _autocast(*ctx.autocast):
            # Views: one input may have been computed from another, and its
            # share is not this function's to count.
            inputs = [
                t.view_as(t) if n else t.detach()
                for t, n in zip(ctx.saved_tensors, needed)
            ]
            y = ctx.function(*inputs)
        found = iter(
            torch.autograd.grad(
                y,
                [t for t, n in zip(inputs, needed) if n],
                grad,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        return (None, None, *(next(found) if n else None for n in needed))


def _autocast(device: str, dtype: Optional[torch.dtype]):
    if device == 'meta':  # which has none
        return contextlib.nullcontext()
    if dtype is None:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype, cache_enabled=False)


def without_autocast(device: torch.device):
    """The context in which kernels and statistics keep their digits."""
    return _autocast(device.type, None)


def autocast_dtype(device: str) -> Optional[torch.dtype]:
    """What autocast makes of a convolution's operands, or None if it is off.

    Args:
        device: A device's type.
    """
    if device == 'meta':
        return None
    try:
        on = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if on else None
    except TypeError:  # before torch 2.4
        if device == 'cpu':
            on = torch.is_autocast_cpu_enabled()
            return torch.get_autocast_cpu_dtype() if on else None
        on = torch.is_autocast_enabled()
        return torch.get_autocast_gpu_dtype() if on else None


# ------------------------------------------------ values of the forward pass


class _Entry:
    """A value of a forward pass that may be run again.

    Attributes:
        key: What tells the passes apart, shape (channels,).
        value: What is remembered.
        owner: Whose it is, or None.
        segments: The checkpointed segments that it was computed in.
        used: Whether it was handed out.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        owner: Optional[int],
        segments: List[int],
    ) -> None:
        self.key, self.value, self.owner = key, value, owner
        self.segments, self.used = set(segments), False

    def is_like(self, key: Tensor, owner: Optional[int]) -> bool:
        return owner == self.owner and (
            (key.shape, key.dtype, key.device)
            == (self.key.shape, self.key.dtype, self.key.device)
        )


class _Memory:
    """Values of forward passes, found by segment, owner and key.

    A segment that is run again comes to its values in their order. Where the
    segment is not known, the newest come first, as backward passes go; of
    equal keys, as of one batch that was run twice, each is handed out once
    before any is again.
    """

    def __init__(self, size: int) -> None:
        self._entries: Deque[_Entry] = deque(maxlen=size)

    def put(
        self,
        key: Tensor,
        value: Tensor,
        owner: Optional[int] = None,
        segments: Sequence[int] = (),
    ) -> None:
        # What inference mode makes no backward pass could use later.
        with torch.inference_mode(False), torch.no_grad():
            entry = _Entry(key.clone(), value.clone(), owner, segments)
        self._entries.append(entry)

    def get(
        self,
        key: Tensor,
        owner: Optional[int] = None,
        segments: Sequence[int] = (),
    ) -> Optional[Tensor]:
        """The value of the nearest key, or None if there is none near.

        Args:
            key: Shape (channels,).
            owner: Whose value it is.
            segments: Those that are run now, the innermost first.
        """
        like = [e for e in self._entries if e.is_like(key, owner)]
        order = list(reversed(like))
        for segment in segments:
            inside = [e for e in like if segment in e.segments]
            if inside:
                order = inside
                break
        if not order:
            return None
        away = torch.stack([key, *(key - entry.key for entry in order)])
        # Of a batch with NaN each is as near, and as good.
        scale, *away = away.nan_to_num(0).abs().amax(1).tolist()
        nearest = min(away)
        # A second run may round differently, and no more.
        if nearest > 1e-3 * scale:
            return None
        equal = [e for e, distance in zip(order, away) if distance == nearest]
        if all(entry.used for entry in equal):
            for entry in equal:
                entry.used = False
        found = next(entry for entry in equal if not entry.used)
        found.used = True
        # A segment inside of one that is run again is a new one.
        found.segments.update(segments)
        return found.value


# Here and not in a module: a compiled graph has no modules left. It holds a
# few numbers a channel for each norm whose border a segment may need again.
_memory = _Memory(4096)


def from_forward(
    key: Callable[[], Tensor], value: Tensor, owner: Tensor
) -> Tensor:
    """A value that depends on state, as the forward pass had it.

    Args:
        key: Gives what tells one forward pass from another, and a second run
            computes again: numbers of the batch, shape (channels,).
        value: What the state gives now, without a gradient.
        owner: The tensor that holds the state.

    Returns:
        Tensor: ``value``, or in a checkpointed segment that is run again what
        it was when the segment ran first.

    Raises:
        RuntimeError: If that is not remembered, because thousands of
            checkpointed forward passes came between.
    """
    if is_transformed() or torch.jit.is_tracing() or _is_exporting():
        return value
    if is_compiling():
        return torch.ops.mmdbb.from_forward(key(), value)
    if is_recomputing():
        found = _memory.get(key(), id(owner), _segments())
        if found is None:
            raise RuntimeError(
                'a checkpointed segment is run again after more than 4096 '
                'others, or on another batch than before: the border that '
                'its forward pass had is not known any more. Run fewer '
                'forward passes before each backward pass, or leave the '
                'blocks out of the segment'
            )
        return found
    segments = _segments()
    if segments:
        _memory.put(key(), value, id(owner), segments)
    return value


def _compiled_from_forward(key: Tensor, value: Tensor) -> Tensor:
    """The same where a compiler has removed what tells the passes apart.

    The partitioner of a compiled graph recomputes no operator that it does
    not know, so what depends on a running statistic is kept; within a
    checkpointed segment it has no choice, and calls this in the backward
    pass.
    """
    if torch._C._current_graph_task_id() != -1:
        found = _memory.get(key)
        if found is not None:
            return found.clone()
    _memory.put(key, value)
    return value.clone()


_library = torch.library.Library('mmdbb', 'FRAGMENT')
_library.define('from_forward(Tensor key, Tensor value) -> Tensor')
_library.impl(
    'from_forward', _compiled_from_forward, 'CompositeExplicitAutograd'
)
# Its name before torch 2.4.
_register_fake = getattr(
    torch.library, 'register_fake', getattr(torch.library, 'impl_abstract', 0)
)
_register_fake('mmdbb::from_forward')(lambda key, value: value.clone())
