# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The stock network: what a config with blocks becomes once it is merged."""
