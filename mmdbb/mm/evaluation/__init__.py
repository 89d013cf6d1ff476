# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A network on its config's own data: images, figures, statistics of norms."""
