# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What the weights of a config's network start from: rules of init_cfg."""
