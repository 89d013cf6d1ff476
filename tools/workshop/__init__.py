# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The workshop: demos, the study, the benchmark, the model zoo's generator."""
