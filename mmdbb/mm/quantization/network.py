# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Load a network to quantize: trained, merged, or trained for INT8."""

from __future__ import annotations

from typing import Tuple

from torch import nn

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import load_strictly, read_checkpoint
from mmdbb.mm.deploy.load import give_structure_
from mmdbb.mm.quantization.fake import WEIGHT, set_quantizing_
from mmdbb.mm.quantization.qat import is_qat_state, prepare_qat_
from mmdbb.mm.quantization.quantizers import REDUCED_LIMIT
from mmdbb.reparam import find_blocks, holds_blocks


def load_network(model: nn.Module, checkpoint: str) -> nn.Module:
    """Load a checkpoint into the network of its config.

    Args:
        model: The network that the config builds; changed in place.
        checkpoint: Path of a checkpoint from a training, quantization-aware
            or not, or from ``tools/reparam.py``.

    Returns:
        nn.Module: The network in eval mode. If the checkpoint has quantizers,
        the network has them too, turned on.

    Raises:
        UserError: If the checkpoint does not fit the network.
    """
    return fill_network(model, read_checkpoint(checkpoint), checkpoint)


def fill_network(
    model: nn.Module,
    loaded: dict,
    checkpoint: str,
    image_size: Tuple[int, int] = (64, 64),
) -> nn.Module:
    """Load a checkpoint that was read already into the network of its config.

    Args:
        model: The network that the config builds; changed in place.
        loaded: The checkpoint, as
            :func:`mmdbb.files.checkpoints.read_checkpoint` returned it.
        checkpoint: Path of the checkpoint, for messages.
        image_size: Height and width in pixels of an image that the network
            takes.

    Returns:
        nn.Module: The network in eval mode. If the checkpoint has quantizers,
        the network has them too, turned on.

    Raises:
        UserError: If the checkpoint does not fit the network.
    """
    state = loaded['state_dict']
    give_structure_(model, loaded)
    if holds_blocks(state, model) and not find_blocks(model):
        raise UserError(
            f'{checkpoint} is not merged, but its config builds a merged '
            'network; give the config that it was trained with'
        )
    if is_qat_state(state):
        try:
            prepare_qat_(model, image_size, **_arguments(state))
        except (ValueError, RuntimeError) as error:
            raise UserError(f'{checkpoint}: {error}') from error
    load_strictly(model, state, checkpoint)
    if is_qat_state(state):
        set_quantizing_(model)
    return model.eval()


def _arguments(state: dict) -> dict:
    """Arguments of ``prepare_qat_`` that give a checkpoint's quantizers."""
    dims = {
        value.dim()
        for name, value in state.items()
        if name.endswith(f'.{WEIGHT}.activation_post_process.min_val')
    }
    limits = {
        int(value)
        for name, value in state.items()
        if name.endswith(f'.{WEIGHT}.limit') and value.numel() == 1
    }
    return dict(
        per_channel=dims != {0},
        reduce_range=limits == {REDUCED_LIMIT},
    )
