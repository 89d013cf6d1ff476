# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Plain weights, from which blocks start: they compute the same function."""
