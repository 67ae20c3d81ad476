"""Marks of what runs on a CUDA device alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def needs_cuda(test: Callable | type) -> Callable | type:
    """A test, or a class of them, with these marks."""
    for mark in NEEDS_CUDA:
        test = mark(test)
    return test
