"""All that a call could change: of a model, and of the process.

Classes, modes, hooks and attributes of modules, values, gradients and what
requires them, random numbers, and the settings of the process.
"""

import logging
import os
import random
import sys
import warnings

import numpy as np
import torch

#: Stands for what is not there.
MISSING = object()


def everything(model):
    """All that a call could change."""
    found = {}
    for name, module in model.named_modules():
        found[name, 'class'] = type(module)
        found[name, 'training'] = module.training
        found[name, 'attributes'] = set(vars(module))
        for key, value in vars(module).items():
            if key == '_cached_kernel':  # a cache, which running fills
                continue
            if key.endswith('_hooks'):
                found[name, key] = dict(value)
            elif isinstance(value, (int, float, str, bool, type(None))):
                found[name, key] = value
    tensors = dict(model.named_parameters())
    for name, parameter in tensors.items():
        found[name, 'requires'] = parameter.requires_grad
        found[name, 'gradient'] = copied(parameter.grad)
    tensors.update(model.named_buffers())
    for name, tensor in tensors.items():
        found[name, 'value'] = copied(tensor)
        found[name, 'is'] = id(tensor)
    return {**found, **process()}


def process():
    """The settings of the process."""
    _, keys, *places = np.random.get_state()
    return {
        'random numbers': (
            random.getstate(),
            (keys.tolist(), places),
            torch.get_rng_state(),
        ),
        'torch': (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
        ),
        'warnings': list(warnings.filters),
        'logging': logging.root.manager.disable,
        'streams': (sys.stdout, sys.stderr),
        'folder': os.getcwd(),
        'environment': dict(os.environ),
    }


def copied(tensor):
    return None if tensor is None else tensor.detach().clone()


def is_same(found, expected):
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(
            map(is_same, found, expected)
        )
    return found == expected


def assert_same(found, expected):
    keys = {**found, **expected}
    changed = [
        key
        for key in keys
        if not is_same(found.get(key, MISSING), expected.get(key, MISSING))
    ]
    assert not changed, changed
