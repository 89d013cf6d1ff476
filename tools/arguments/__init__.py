# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The tools' arguments: read and checked before anything is imported.

Importing torch and OpenMMLab's packages takes seconds and most of a gigabyte.
So these files import the standard library only, and a tool imports what it
works with in its ``main``. A wrong argument or path ends it at once.
"""

from arguments.common import (
    add_config_arguments,
    add_image_choice_arguments,
    add_image_size_argument,
    add_launcher_arguments,
    add_training_arguments,
    add_unsafe_argument,
)
from arguments.numbers import (
    at_least_one,
    at_least_zero,
    between_zero_and_one,
    from_zero_to_one,
    seed,
)
from arguments.parser import Parser
from arguments.paths import add_checkpoint_argument, add_output_argument
from arguments.run import run

__all__ = [
    'Parser',
    'add_checkpoint_argument',
    'add_config_arguments',
    'add_image_choice_arguments',
    'add_image_size_argument',
    'add_launcher_arguments',
    'add_output_argument',
    'add_training_arguments',
    'add_unsafe_argument',
    'at_least_one',
    'at_least_zero',
    'between_zero_and_one',
    'from_zero_to_one',
    'run',
    'seed',
]
