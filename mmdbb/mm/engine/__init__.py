# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The code around a model: launching, hooks, optimizer rules."""
