"""Blocks in these tests are tiny; what is tested is what large ones do."""

import pytest
from helpers import every_batch_is_large


@pytest.fixture(autouse=True)
def _large(request):
    if request.node.get_closest_marker('small_batches'):
        yield
        return
    with every_batch_is_large():
        yield
