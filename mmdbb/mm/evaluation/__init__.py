# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run a network on its config's data: images, figures, norm statistics."""
