# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""INT8 networks: quantize after training, train for INT8, report ranges.

``import mmdbb`` leaves this package out. The tools import it, and a config
that uses its hook lists ``mmdbb.quantize`` in ``custom_imports``. Writing INT8
files needs the extra ``quantization``; training for INT8 needs nothing more.
"""
