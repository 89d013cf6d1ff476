# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Convert checkpoints of the papers' repositories to OpenMMLab's names."""
