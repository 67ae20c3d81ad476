"""Errors for those who have no command line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from megatron_adamba.config.script import without_flags
from megatron_adamba.errors import AdambaError

P = ParamSpec("P")
T = TypeVar("T")


def naming_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with `top_p` for `--top-p` in what it raises."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except AdambaError as error:
            raise reworded(error) from error.__cause__

    return call


def reworded(error: AdambaError) -> AdambaError:
    """An error of the same class that names arguments."""
    told = without_flags(str(error))
    return error if told == str(error) else type(error)(told)
