# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to a merged one that is proven equal."""
