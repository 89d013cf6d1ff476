# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Load the files that mmdbb's tools wrote, whatever the network's structure.

A config cannot say that norms are folded, or how many filters pruning left.
The checkpoint can: mmdbb notes the structure in it, and the shapes of its
weights tell the numbers of filters.
"""

from __future__ import annotations

import copy
from typing import Dict

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.dimensions import CONVS
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import load_strictly, read_checkpoint
from mmdbb.mm.structure import Structure, written_structure


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model in eval mode, with random weights.

    Args:
        cfg: The config; unchanged.

    Raises:
        UserError: If the config has no model, or it cannot be built.
    """
    if cfg.get('model') is None:
        raise UserError('the config has no model')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    try:
        # A copy, because builders may change the dicts that they get.
        model = MODELS.build(copy.deepcopy(cfg.model))
    except (KeyError, TypeError, ValueError, ImportError) as error:
        raise UserError(
            f'cannot build the model of the config: {error}'
        ) from error
    model.train(False)
    return model


def load_deployed(config: str, checkpoint: str) -> nn.Module:
    """Build a network that one of mmdbb's tools wrote, of any structure.

    Args:
        config: Path of the config, which is beside the checkpoint.
        checkpoint: Path of a checkpoint that ``tools/reparam.py``,
            ``tools/convert_official.py`` or ``tools/prune.py`` wrote.

    Returns:
        nn.Module: The network with the weights, in eval mode, on the CPU.

    Raises:
        UserError: If the two do not fit each other.
    """
    loaded = read_checkpoint(checkpoint)
    model = network_of(config, loaded)
    load_strictly(model, loaded['state_dict'], checkpoint)
    return model


def network_of(config: str, checkpoint: dict) -> nn.Module:
    """Build the network that two files describe, with random weights.

    Args:
        config: Path of the config.
        checkpoint: Content of the checkpoint, read by
            :func:`read_checkpoint`. Its weights are not loaded.

    Returns:
        nn.Module: The network in eval mode, on the CPU.

    Raises:
        UserError: If the network cannot be built.
    """
    return give_structure_(build_model(Config.fromfile(config)), checkpoint)


def give_structure_(model: nn.Module, checkpoint: dict) -> nn.Module:
    """Give a network the structure noted in a checkpoint, in place.

    If the checkpoint asks for it, folded norms are removed and convolutions
    get biases, or layers are made narrower.

    Args:
        model: The network that the config builds.
        checkpoint: Content of the checkpoint, read by
            :func:`read_checkpoint`. Its weights are not loaded.

    Returns:
        nn.Module: ``model``.
    """
    structure = written_structure(checkpoint)
    if structure is Structure.FUSED:
        _give_fused_(model, checkpoint['state_dict'])
    elif structure is Structure.PRUNED:
        _resize_(model, checkpoint['state_dict'])
    return model


def _give_fused_(model: nn.Module, state: Dict[str, Tensor]) -> None:
    """Remove the norms that weights lack, and add the biases they have.

    The new biases are uninitialised; the caller loads the weights.

    Args:
        model: The stock network, changed in place.
        state: Entries of the fused network.
    """
    present = {name.rpartition('.')[0] for name in state}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, CONVS):
            bias = state.get(f'{name}.bias')
            if module.bias is None and bias is not None:
                # In the precision of the network, to which all is loaded.
                empty = module.weight.new_empty(bias.shape)
                module.bias = nn.Parameter(empty)
        elif isinstance(module, _BatchNorm) and name not in present:
            if module.state_dict():  # a norm without entries is in no file
                parent, _, attribute = name.rpartition('.')
                model.get_submodule(parent).add_module(
                    attribute, nn.Identity()
                )


def _resize_(model: nn.Module, state: Dict[str, Tensor]) -> None:
    """Resize layers to the shapes in a state dict, in place.

    The new tensors are uninitialised; the caller loads the weights.

    Args:
        model: The network as it was before pruning.
        state: Entries of the pruned network.
    """
    for name, module in model.named_modules():
        weight = state.get(f'{name}.weight')
        own = getattr(module, 'weight', None)
        if weight is None or not isinstance(own, Tensor):
            continue
        if weight.dim() != own.dim() or not weight.numel():
            raise UserError(
                f'the pruned {name} has weights of shape '
                f'{tuple(weight.shape)}, which the {tuple(own.shape)} of the '
                "config's network cannot be pruned to"
            )
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups == module.in_channels > 1
            module.out_channels = weight.shape[0]
            if depthwise:
                module.groups = weight.shape[0]
            module.in_channels = weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, _BatchNorm):
            module.num_features = len(weight)
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = len(weight)
        else:
            continue
        for kind in (module._parameters, module._buffers):
            for entry, value in kind.items():
                full = state.get(f'{name}.{entry}')
                if value is None or full is None:
                    continue
                new = torch.empty_like(full, device=value.device)
                if isinstance(value, nn.Parameter):
                    new = nn.Parameter(new, value.requires_grad)
                kind[entry] = new
