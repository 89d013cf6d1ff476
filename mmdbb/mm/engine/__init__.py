# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What runs around a model: launching, hooks, optimizer rules."""
