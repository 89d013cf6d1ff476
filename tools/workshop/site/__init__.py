# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The docs as a website: the pages of README and docs, and the API."""
