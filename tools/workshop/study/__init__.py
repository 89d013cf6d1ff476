# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The study: what blocks gain on Fashion-MNIST, and what they cost."""
