"""Which layouts of a grid run only with the slow ones."""

import pytest


def slow(*values):
    """Parameters of a test among the slow grids: four ranks on few cores take long."""
    return pytest.param(*values, marks=pytest.mark.slow)
