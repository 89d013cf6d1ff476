# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A hook of mmengine's Runner that says before training what blocks there are.

It says how many blocks each part of the network has, which parts take
``conv_cfg`` and build none, and which blocks the stock network will have no
place for once they are merged, with the ways out. After the training it would
be too late for most of these ways.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Dict, Iterator, List, Sequence

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mmdbb.files.sources import some
from mmdbb.mm.deploy.parts import (
    Part,
    parts_of,
    refuse_no_block,
    why_no_stock,
)
from mmdbb.mm.deploy.places import NoPlace, without_place
from mmdbb.mm.engine.random_numbers import random_numbers_kept
from mmdbb.modules import unwrapped, why_not_merged
from mmdbb.reparam import find_blocks

_LINE = '*' * 79


@HOOKS.register_module()
class BlocksHook(Hook):
    """Says at the start of training what blocks the network has.

    ``tools/train.py`` adds it by itself. It reads the network and the config,
    and changes nothing: no weight, no statistic, no random number. A network
    whose config asks for no block is a plain baseline, of which it says
    nothing. Nothing is said in tests and validations either.

    Examples:
        >>> HOOKS.build(dict(type='BlocksHook')).priority
        'VERY_HIGH'
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._said = False

    def before_train(self, runner: Runner) -> None:
        """Say it, unless :meth:`say` was called already.

        Raises:
            UserError: If the config asks for blocks, and there is none.
        """
        self.say(runner)

    def say(self, runner: Runner) -> None:
        """Write to the runner's log what blocks the network has, once.

        Args:
            runner: The runner, with its network built.

        Raises:
            UserError: If the config asks for blocks, and there is none.
        """
        # Some runners build their network only when the training begins.
        if self._said or not isinstance(runner.model, nn.Module):
            return
        self._said = True
        model = unwrapped(runner.model)
        refuse_no_block(runner.cfg, model)
        if not find_blocks(model) or not is_main_process():
            return
        parts = parts_of(runner.cfg, model)
        runner.logger.info(_counts(model, parts))
        ignored = [part.why_none for part in parts if not part.blocks]
        if ignored:
            runner.logger.warning(
                f'these parts train as plain ones: {"; ".join(ignored)}'
            )
        changed = {
            name: why_not_merged(block)
            for name, block in find_blocks(model).items()
        }
        changed = {name: reason for name, reason in changed.items() if reason}
        if changed:
            first, reason = next(iter(changed.items()))
            train = 'block trains' if len(changed) == 1 else 'blocks train'
            runner.logger.warning(
                f'{len(changed)} {train}, but cannot be merged in this '
                f'network: {first}: {reason}. To merge them, load the '
                'weights into the network without it'
            )
        with random_numbers_kept():
            built_in = why_no_stock(runner.cfg)
            homeless = without_place(model)
        if built_in:
            runner.logger.warning(
                f'tools/reparam.py will refuse the trained network: {built_in}'
            )
        if homeless.readers:
            runner.logger.warning('\n'.join(_warning(parts, homeless)))


def _counts(model: nn.Module, parts: Sequence[Part]) -> str:
    """How many blocks the parts have."""
    blocks = {block: name for name, block in find_blocks(model).items()}
    text = []
    for place, names in _by_part(blocks.values(), parts).items():
        plain = sum(p.plain for p in parts if p.asked.place == place)
        text.append(
            f'{place} {len(names)}'
            + (f' (and {plain} plain of such a size)' if plain else '')
        )
    count = len(blocks)
    return f'{count} block{"s"[: count > 1]} of mmdbb: {", ".join(text)}'


def _by_part(
    names: Sequence[str], parts: Sequence[Part]
) -> Dict[str, List[str]]:
    """Sort names of blocks by the innermost part that they belong to."""
    places = {
        name: part.asked.place
        for part in sorted(parts, key=lambda part: len(part.asked.place))
        for name in part.blocks
    }
    found = defaultdict(list)
    for name in names:
        found[places.get(name) or name.partition('.')[0]].append(name)
    return dict(found)


def _warning(parts: Sequence[Part], homeless: NoPlace) -> Iterator[str]:
    """Lines on the blocks that the stock network has no place for."""
    readers = homeless.readers
    by_part = _by_part(list(readers), parts)
    yield ''
    yield _LINE
    yield (
        f'{len(readers)} blocks have no place in the stock network: merging '
        'gives each a bias.'
    )
    yield 'There its convolution has none, and what follows takes none either:'
    for place, names in by_part.items():
        kinds = dict.fromkeys(k for name in names for k in readers[name])
        behind = ' or '.join(kinds) or 'no norm of its own'
        yield f'  {place}: {len(names)} before {behind} ({some(names)})'
    if homeless.reason:
        yield f'(by names where not by the data: {homeless.reason})'
    yield 'tools/reparam.py will refuse them. Choose a way out now:'
    by_place = {part.asked.place: part.asked for part in parts}
    for place in by_part:
        asked = by_place.get(place)
        key = f'model.{place}.{asked.key}.' if asked else f'{place}: '
        if asked and _takes(asked.kind, 'conv_bias'):
            yield f'  - model.{place}.conv_bias=True: its convolutions get one'
        yield f'  - {key}shift=False: norms that scale, no bias'
        yield f'  - {key}type=OREPA: a block without norms'
    yield '  - deploy with --format fused or onnx, whose files hold any bias'
    yield '  - deploy with --skip, which leaves these blocks as they are'
    yield _LINE


def _takes(kind: object, argument: str) -> bool:
    """Whether a class's constructor takes an argument, or passes it on."""
    for cls in getattr(kind, '__mro__', ()):
        if '__init__' not in vars(cls):
            continue
        parameters = inspect.signature(cls.__init__).parameters
        if argument in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return False
