"""Which layouts of a grid run only with the slow ones."""

import pytest


def slow(*values):
    """Parameters of a test that run among the slow ones: many ranks on few cores, or a layout much like a quick one."""
    return pytest.param(*values, marks=pytest.mark.slow)
