# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Compute intermediate results again in the backward pass.

The second computation must give the result of the first, although buffers may
have changed in between: a head that is shared over levels runs several times
before its one backward pass, and a compiler reorders reads and writes. So
:func:`again` passes every value to the function as an argument. A segment that
the user checkpoints runs again as a whole; there :func:`from_forward` returns
the value that the segment had in its forward pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from types import FrameType
from typing import (
    Callable,
    Deque,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.modules import shadow

# torch 2.1 has no torch.compiler.is_compiling, 2.6 no is_exporting.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)
is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)

# Modules of autograd's engine. Frames above one of theirs were called by it.
_ENGINE = ('torch.autograd', 'torch.autograd.graph')


def is_recording() -> bool:
    """Whether torch records operations, to run them later without Python.

    That is when it compiles or exports, and in ``torch.jit.trace``.
    """
    return is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work.

    For both, an ``autograd.Function`` needs more than a backward pass, and
    neither can differentiate through a cached value.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_recomputing() -> bool:
    """Whether a checkpointed segment is being run again for its gradient.

    A hook may start a forward pass during the backward pass. That is a new
    pass, because the engine called it and not a checkpoint.
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
    """List the checkpointed segments that are running, innermost first.

    Returns:
        list: For each segment, the ``id`` of an object that its checkpoint
        keeps from the forward to the backward pass.
    """
    kept = []
    for frame in _frames():
        if _is_checkpoint(frame, 'forward') or _is_checkpoint(
            frame, 'backward'
        ):
            values = frame.f_locals
            generator = getattr(values.get('gen'), 'gi_frame', None)
            if generator is not None:  # torch's checkpoint, not reentrant
                values = generator.f_locals
            for name in ('ctx', 'new_frame', 'frame'):
                kept.append(values.get(name))
    # A checkpoint that keeps no such object still counts as one segment.
    found = [id(value) for value in kept if value is not None]
    return found or ([0] if kept else [])


def _is_checkpoint(frame: FrameType, method: str) -> bool:
    """Whether a frame belongs to a checkpoint, of torch or another library.

    Other libraries write an ``autograd.Function``, whose methods take ``ctx``.

    Args:
        frame: The frame.
        method: ``'forward'`` or ``'backward'``.
    """
    if frame.f_globals.get('__name__') == 'torch.utils.checkpoint':
        return True
    code = frame.f_code
    return (
        code.co_name == method
        and code.co_varnames[:1] == ('ctx',)
        and code is not _Again.forward.__code__  # gets all values as arguments
    )


def _frames() -> Iterator[FrameType]:
    frame: Optional[FrameType] = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


# --------------------------------------------------- running a function again


def again(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    module: Optional[nn.Module] = None,
) -> Tensor:
    """Run a function, and run it again in the backward pass.

    Autograd keeps the function's inputs, but no intermediate results. Second
    derivatives work. If an input is changed in place before the backward
    pass, that pass raises, as it does for any tensor that autograd keeps.

    Args:
        function: Computes one tensor from ``tensors``. It must compute the
            same at each call, and must not read buffers of norms. With
            ``module``, it gets the module, or a twin of it, as its first
            argument.
        tensors: Inputs of the function.
        module: A module that the function reads. Its parameters, its buffers
            (except those of norms) and weights that hooks computed count as
            inputs too.

    Returns:
        Tensor: The function's result.
    """
    if is_compiling():
        # The compiler decides by itself what to keep.
        own = () if module is None else (module,)
        return function(*own, *tensors)
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

    if not torch.is_grad_enabled() or not any(
        t.requires_grad for t in (*tensors, *read)
    ):
        return run(*tensors, *read)
    device = (*tensors, *read)[0].device.type
    return _Again.apply(run, device, *tensors, *read)


def _places(
    module: nn.Module,
) -> Iterator[Tuple[Tuple[int, str], Tensor]]:
    """The tensors that a module reads, each with its place.

    Yields:
        tuple: The ``id`` of a submodule and a name in it; and the tensor.
    """
    for each in module.modules():
        read: List[Mapping[str, Optional[Tensor]]] = [each._parameters]
        if not isinstance(each, _BatchNorm):
            read.append(each._buffers)
        # Weights that hooks computed, and the weights of replicas.
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
    """Keeps its inputs only; the backward pass runs the function again."""

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
            # Views, because one input may have been computed from another:
            # gradients must stop here and not flow on between the inputs.
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
    if device == 'meta':  # has no autocast
        return contextlib.nullcontext()
    if dtype is None:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype, cache_enabled=False)


def without_autocast(device: torch.device):
    """A context without autocast, in which kernels and statistics are exact.

    Args:
        device: The device that computes.
    """
    return _autocast(device.type, None)


def autocast_dtype(device: str) -> Optional[torch.dtype]:
    """The dtype that autocast gives to a convolution's inputs; None if off.

    Args:
        device: Type of the device, such as ``'cpu'``.
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
    """A value that a forward pass had, in case it is run again.

    Attributes:
        key: Numbers that tell forward passes apart, shape (channels,).
        value: The value to remember.
        owner: ``id`` of the tensor that the value depends on, or None.
        segments: The checkpointed segments in which it was computed.
        used: Whether it was returned to a second run.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        owner: Optional[int],
        segments: Sequence[int],
    ) -> None:
        self.key, self.value, self.owner = key, value, owner
        self.segments, self.used = set(segments), False

    def is_like(self, key: Tensor, owner: Optional[int]) -> bool:
        return owner == self.owner and (
            (key.shape, key.dtype, key.device)
            == (self.key.shape, self.key.dtype, self.key.device)
        )


#: Keys of one batch differ by no more than so many units of their precision.
_ROUNDING = 64


class _Memory:
    """Values of forward passes, found by segment, owner and key.

    A segment that is run again asks for its values in the order in which it
    stored them. Where the segment is unknown, the newest value comes first,
    because backward passes go from the last forward pass to the first. A
    batch that was run twice has equal keys; then each value is returned once
    before any is returned again.

    Args:
        size: Number of values to remember; older ones are forgotten.
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
        # A tensor made in inference mode could not be used in a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            entry = _Entry(key.clone(), value.clone(), owner, segments)
        self._entries.append(entry)

    def get(
        self,
        key: Tensor,
        owner: Optional[int] = None,
        segments: Sequence[int] = (),
    ) -> Optional[Tensor]:
        """The value with the nearest key, or None if no key is near.

        Args:
            key: Numbers that tell forward passes apart, shape (channels,).
            owner: ``id`` of the tensor that the value depends on, or None.
            segments: The checkpointed segments that are running, innermost
                first.
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
        # A batch with NaN is equally near to all; any value will do.
        scale, *far = away.nan_to_num(0).abs().amax(1).tolist()
        nearest = min(far)
        # A second run may round differently, but differs no more than that.
        if nearest > 1e-3 * scale:
            return None
        # Two compiled graphs round the means of one batch differently, and
        # so do two numbers of threads: that is no nearer.
        same = nearest + _ROUNDING * torch.finfo(key.dtype).eps * scale
        equal = [e for e, distance in zip(order, far) if distance <= same]
        if all(entry.used for entry in equal):
            for entry in equal:
                entry.used = False
        found = next(entry for entry in equal if not entry.used)
        found.used = True
        # Inner segments get new objects when the outer one is run again.
        found.segments.update(segments)
        return found.value


# A global, because a compiled graph has no modules in which it could stand. It
# holds a few numbers per channel for each border that may be needed again.
_memory = _Memory(4096)


def from_forward(
    key: Callable[[], Tensor], value: Tensor, owner: Tensor
) -> Tensor:
    """Return a value that depends on state, as it was in the forward pass.

    Args:
        key: Computes numbers from the batch that tell one forward pass from
            another and come out the same in a second run, shape (channels,).
        value: The value by the present state, without a gradient.
        owner: The tensor that holds the state.

    Returns:
        Tensor: ``value``. In a checkpointed segment that is run again, the
        value that it had when the segment ran first.

    Raises:
        RuntimeError: If that value is forgotten, because thousands of
            checkpointed forward passes came in between.
    """
    if is_transformed() or torch.jit.is_tracing() or is_exporting():
        return value
    if is_compiling():
        return torch.ops.mmdbb.from_forward(key(), value)
    if is_recomputing():
        found = _memory.get(key(), id(owner), _segments())
        if found is None:
            raise RuntimeError(
                'a checkpointed segment is run again after more than 4096 '
                'others, or on another batch than before: the border of its '
                'forward pass is forgotten. Run fewer forward passes before '
                'each backward pass, or leave the blocks out of the segment'
            )
        return found
    segments = _segments()
    if segments:
        _memory.put(key(), value, id(owner), segments)
    return value


def _compiled_from_forward(key: Tensor, value: Tensor) -> Tensor:
    """:func:`from_forward` in a compiled graph, as an operator of its own.

    A compiled graph has no frames that show segments. But a compiler never
    recomputes an operator that it does not know, so it keeps the value. Only
    within a checkpointed segment it must call this again, in the backward
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


def _like_value(key: Tensor, value: Tensor) -> Tensor:
    """What the operator returns, for tensors without data."""
    return torch.empty_like(value)


# Before torch 2.4 this function was called impl_abstract; 2.1 has neither.
_register_fake = getattr(
    torch.library,
    'register_fake',
    getattr(torch.library, 'impl_abstract', None),
)
if _register_fake is None:
    _library.impl('from_forward', _like_value, 'Meta')
else:
    _register_fake('mmdbb::from_forward')(_like_value)
