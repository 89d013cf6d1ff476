# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The version, alone, for setup.py to read."""

__version__ = '0.1.0'
