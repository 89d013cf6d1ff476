# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Checkpoints of the papers' repositories, as OpenMMLab's have them."""
