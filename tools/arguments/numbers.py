# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Numbers in arguments: each function is the ``type`` of an argument."""

import argparse
import math
from typing import Callable


def at_least_one(text: str) -> int:
    """Parse a count: the `type` of arguments such as `--calib`.

    Args:
        text: The argument as typed.

    Raises:
        argparse.ArgumentTypeError: If it is no whole number from 1 on.
    """
    return _number(int, text, lambda n: n >= 1, 'a whole number from 1 on')


def at_least_zero(text: str) -> float:
    """Parse a limit or a factor: the `type` of `--wait-time` and others.

    Args:
        text: The argument as typed.

    Raises:
        argparse.ArgumentTypeError: If it is no finite number from 0 on.
    """
    return _number(
        float, text, lambda n: 0 <= n < math.inf, 'a finite number from 0 on'
    )


def between_zero_and_one(text: str) -> float:
    """Parse a share of which neither nothing nor all is meant.

    Args:
        text: The argument as typed.

    Raises:
        argparse.ArgumentTypeError: If it is no number between 0 and 1.
    """
    return _number(
        float, text, lambda n: 0 < n < 1, 'a number between 0 and 1'
    )


def from_zero_to_one(text: str) -> float:
    """Parse a score: the `type` of `--min-score`.

    Args:
        text: The argument as typed.

    Raises:
        argparse.ArgumentTypeError: If it is no number from 0 to 1.
    """
    return _number(float, text, lambda n: 0 <= n <= 1, 'a number from 0 to 1')


def seed(text: str) -> int:
    """Parse a seed, which NumPy's generators limit to 32 bits.

    Args:
        text: The argument as typed.

    Raises:
        argparse.ArgumentTypeError: If it is no whole number of 32 bits.
    """
    return _number(
        int,
        text,
        lambda n: 0 <= n < 2**32,
        'a whole number from 0 to 2**32 - 1',
    )


def _number(
    kind: type, text: str, allowed: Callable[[float], bool], what: str
):
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not allowed(number):
        raise argparse.ArgumentTypeError(f'must be {what}, got {text!r}')
    return number
