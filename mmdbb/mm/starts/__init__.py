# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Rules for ``init_cfg`` in a config: the start values of a network."""
