# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Mistakes of the user's, as opposed to mistakes of ours."""


class UserError(Exception):
    """Something that the user can put right: a path, a config, a file.

    The message is one line that names what was given and what is allowed.
    """
