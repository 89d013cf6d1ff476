# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Blocks in every network that OpenMMLab's packages have a config for.

``tools/sweep.py`` runs it and writes `docs/hosts.md`.
"""
