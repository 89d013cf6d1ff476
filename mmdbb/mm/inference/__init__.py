# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Predictions for single images, by networks in any file that mmdbb writes."""
