# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Reading, converting and writing checkpoints."""
