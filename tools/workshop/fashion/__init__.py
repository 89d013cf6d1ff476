# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""ResNet-18 with and without blocks on all of Fashion-MNIST, on a GPU."""
