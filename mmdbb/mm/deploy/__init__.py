# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merge trained checkpoints, and prove the merged networks equal."""
