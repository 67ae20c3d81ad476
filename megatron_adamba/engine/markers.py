"""Attributes by which DeepSpeed knows a parameter."""

from __future__ import annotations

from torch import nn


def mark(parameter: nn.Parameter, **marks: object) -> None:
    for name, value in marks.items():
        setattr(parameter, name, value)
