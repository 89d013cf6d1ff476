# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The demo: real digits, three tasks, trained, merged and compared.

The package needs the extra ``demo``; nothing else in mmdbb imports it.
"""
