# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Files of weights: read without running code, written whole or not at all."""
