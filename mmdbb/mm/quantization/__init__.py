# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Networks in eight bits: after training, while training, and what to expect.

Imported on its own, by the tools or by ``custom_imports`` of a config that
uses its hooks. Writing INT8 files needs the extra ``quantization``; training
for them needs torch only.
"""
