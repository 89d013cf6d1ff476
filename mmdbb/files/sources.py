# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Find the weights in a checkpoint: trained or averaged, without prefixes.

mmengine's ``EMAHook`` exchanges two state dicts while saving: it writes the
averaged weights under ``state_dict`` and the trained ones under
``ema_state_dict``. timm writes the averaged weights under ``state_dict_ema``,
torchvision's recipes under ``model_ema``. Model wrappers put a prefix before
all names.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import (
    Any,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import torch
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.files.values import Unread

State = Dict[str, Tensor]

#: Keys under which weights stand, the most likely first.
TRAINED = ('state_dict', 'model', 'model_state_dict')
AVERAGED = ('state_dict_ema', 'model_ema', 'ema_state_dict')
#: Entries in which averaged models count steps: mmengine's, torch's.
COUNTERS = ('steps', 'n_averaged')
#: Prefixes of ``DistributedDataParallel`` and averaged models, and of
#: ``torch.compile``.
PREFIXES = ('module.', '_orig_mod.')
#: Largest number of characters of a name in a message.
LONGEST_SHOWN = 200
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Weights(NamedTuple):
    """The weights taken from a checkpoint.

    Attributes:
        state: Names, without prefixes of wrappers -> tensors.
        key: Key of the checkpoint under which they stood; empty for a bare
            state dict.
        kind: ``averaged`` or ``trained`` where the file tells; else empty.
    """

    state: State
    key: str
    kind: str

    def __str__(self) -> str:
        kind = f'the {self.kind} ones' if self.kind else 'the only ones'
        return f'{kind}, {self.key}' if self.key else kind


def choose_weights(
    checkpoint: dict, path: str, ema: Optional[bool] = None
) -> Weights:
    """Choose the state dict of a checkpoint.

    Args:
        checkpoint: Content of the file: a state dict, or a dict that holds
            one or more.
        path: The file, for messages.
        ema: True for the averaged weights, False for the weights that are
            trained; None for the averaged ones if the file has any.

    Raises:
        UserError: If there are no weights, or none of the kind asked for.
    """
    found = _by_kind(checkpoint)
    if ema is None:
        wanted = ['averaged', 'trained', '']
    else:
        wanted = ['averaged' if ema else 'trained']
        if not ema and 'averaged' not in found:
            # Nothing was averaged, so the only weights are the trained ones.
            wanted.append('')
    kind = next((kind for kind in wanted if kind in found), None)
    if kind is None:
        option, what = (
            ('--ema', 'averaged weights')
            if ema
            else ('--no-ema', 'weights but averaged ones')
        )
        raise UserError(
            f'{path} has no {what}, which {option} asks for; it holds: '
            f'{some([str(key) for key in checkpoint], 9)}'
        )
    key, state = found[kind]
    if not state:
        differences = [k for k in map(str, checkpoint) if k.endswith('_delta')]
        if differences:
            raise UserError(
                f'{path} holds differences to other weights '
                f'({some(differences)}), not weights; add them to those first'
            )
        raise UserError(f'{path} has no weights: its state_dict is empty')
    return Weights(without_prefixes(state), key, kind)


def _by_kind(checkpoint: dict) -> Dict[str, Tuple[str, Any]]:
    """Find all state dicts of a checkpoint: kind -> key and state dict."""
    states = {
        key: _state_of(checkpoint[key])
        for key in (*TRAINED, *AVERAGED)
        if key in checkpoint
    }
    states = {k: v for k, v in states.items() if isinstance(v, dict)}
    trained = next((key for key in TRAINED if key in states), None)
    averaged = next((key for key in AVERAGED if key in states), None)
    if trained is None and averaged is None:
        if 'state_dict' in checkpoint or not checkpoint:
            return {'': ('state_dict', {})}
        if all(isinstance(v, (Tensor, Unread)) for v in checkpoint.values()):
            kind = 'averaged' if _is_averaged(checkpoint) else ''
            return {kind: ('', checkpoint)}
        if any(str(key).endswith('_delta') for key in checkpoint):
            return {'': ('', {})}
        return {'': ('', checkpoint)}
    if averaged is None:
        assert trained is not None  # one of the two is there
        return {'': (trained, states[trained])}
    if trained is None:
        return {'averaged': (averaged, states[averaged])}
    # mmengine exchanges the two while saving.
    if averaged == 'ema_state_dict' and 'steps' in states[averaged]:
        trained, averaged = averaged, trained
    return {
        'averaged': (averaged, states[averaged]),
        'trained': (trained, states[trained]),
    }


def _state_of(value: Any) -> Any:
    """The state dict of a network that was saved whole; others stay."""
    return value.state_dict() if isinstance(value, nn.Module) else value


def _is_averaged(state: dict) -> bool:
    names = [name for name in state if name not in COUNTERS]
    return len(names) < len(state) and _all_start(names, 'module.')


def without_prefixes(state: State) -> State:
    """Remove the prefixes of model wrappers, where all names have them.

    Args:
        state: Names -> tensors. An averaged model's counter is removed too.
    """
    whole = state
    if _is_averaged(state):
        state = {k: v for k, v in state.items() if k not in COUNTERS}
    names = list(state)
    start = 0
    while True:
        for prefix in PREFIXES:
            if _all_start(names, prefix, start):
                start += len(prefix)
                break
        else:
            break
    if not start:
        return state
    return with_versions_of(
        whole,
        {name[start:]: value for name, value in state.items()},
        lambda name: name[start:],
    )


def with_versions_of(
    source: State,
    state: State,
    renamed: Callable[[str], Optional[str]] = lambda name: name,
) -> State:
    """Give a state dict the versions of layers that another one has.

    torch keeps them in the attribute ``_metadata``, which an ordinary dict
    cannot have. A layer that finds no version takes its entries for those of
    its oldest version, and converts or refuses them.

    Args:
        source: The state dict with the versions, if it has any.
        state: The entries.
        renamed: Translates names of layers in ``source``; None leaves one
            out.

    Returns:
        dict: The entries, with the versions.
    """
    versions = getattr(source, '_metadata', None)
    if versions is None:
        return state
    versioned: Any = OrderedDict(state)
    # Copies, because loading by assignment leaves a note in each.
    versioned._metadata = OrderedDict(
        (renamed(name), dict(values))
        for name, values in versions.items()
        if renamed(name) is not None
    )
    return versioned


def _all_start(names: List[Any], prefix: str, start: int = 0) -> bool:
    return bool(names) and all(
        isinstance(name, str) and name.startswith(prefix, start)
        for name in names
    )


def check_values(state: dict, path: str, limit: float = float('inf')) -> None:
    """Refuse entries that no network of OpenMMLab's packages has.

    Args:
        state: The state dict to check. Its keys and values may be anything.
        path: The file, for messages.
        limit: Largest number of values in one entry.

    Raises:
        UserError: If an entry is no plain tensor, has a dtype in which
            networks do not compute, has values that are not finite, or is a
            negative variance.
    """
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(
                f'{path} is not a checkpoint: {shown(repr(name))} is no name '
                'of an entry'
            )
        if not isinstance(value, (Tensor, Unread)):
            raise UserError(
                f'{path} is not a checkpoint: entry {shown(repr(name))} is no '
                'tensor'
            )
        strange = _strange(value, limit)
        if strange:
            raise UserError(
                f'{path} has entries that are {strange}: {some([name])}'
            )
    floating = {k: v for k, v in state.items() if v.is_floating_point()}
    # A tensor may have several names; check it once.
    infinite = {
        key
        for key, value in _distinct(floating).items()
        if not _all_finite(value)
    }
    bad = [
        name
        for name, value in floating.items()
        # A quantizer's observer that has seen no values yet has the range from
        # infinity to minus infinity.
        if '.activation_post_process.' not in name and id(value) in infinite
    ]
    if bad:
        raise UserError(f'{path} has values that are not finite: {some(bad)}')
    variances = {
        k: v for k, v in floating.items() if k.endswith('running_var')
    }
    negative = {
        key for key, value in _distinct(variances).items() if (value < 0).any()
    }
    bad = [name for name, value in variances.items() if id(value) in negative]
    if bad:
        raise UserError(f'{path} has a negative variance: {some(bad)}')


def _distinct(state: State) -> Dict[int, Tensor]:
    """All different tensors of a state dict, by their ``id``."""
    return {id(value): value for value in state.values()}


def _all_finite(value: Tensor) -> bool:
    # If the sum is finite, all terms are, and a sum is cheaper. Where it
    # overflows, test each number.
    return bool(value.sum().isfinite() or value.isfinite().all())


def _strange(value: Union[Tensor, Unread], limit: float) -> str:
    if isinstance(value, Unread):
        return value.what
    dtype = str(value.dtype).rpartition('.')[2]
    if value.is_nested:
        return 'nested'
    if value.is_quantized:
        return f'quantized ({dtype})'
    if value.layout != torch.strided:
        return 'sparse'
    if value.device.type != 'cpu':
        return f'without values ({value.device.type})'
    if value.is_complex() or (
        value.is_floating_point() and value.dtype not in DTYPES
    ):
        return f'of type {dtype}'
    # With strides of zero, a few bytes can claim to be many numbers.
    if value.numel() > limit:
        return f'larger than the file ({value.numel():.0e} numbers)'
    return ''


def some(names: List[str], count: int = 3) -> str:
    """List the first names, and say how many more there are.

    Args:
        names: The names.
        count: How many to list.
    """
    text = ', '.join(map(shown, names[:count]))
    if len(names) > count:
        text += f' and {len(names) - count} more'
    return text


def shown(name: str) -> str:
    """Make a name fit for a message.

    Names in a damaged file may be very long or have any characters.
    """
    text = name if name.isprintable() else repr(name)
    if len(text) <= LONGEST_SHOWN:
        return text
    return f'{text[:LONGEST_SHOWN]}... ({len(name):,} characters)'
