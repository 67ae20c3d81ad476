"""Marks of what runs on a CUDA device alone."""

from __future__ import annotations

import pytest
import torch

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
