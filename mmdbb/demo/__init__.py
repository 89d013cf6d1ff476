"""The demo: real digits, three tasks, trained, merged and compared.

The package needs the extra ``demo`` (``pip install 'mmdbb[demo]'``); nothing
else in mmdbb imports it.
"""


class DemoError(Exception):
    """What stops the demo and the user can put right, said in one line."""
