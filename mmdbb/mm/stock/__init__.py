# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Configs of merged networks: the stock network's, and of partial merges."""
