"""A run that learns nothing is told so: its loss is that of guessing all tokens alike."""

from __future__ import annotations

import math

WINDOW = 200
"""steps, behind the warm-up, in which one loss at least should be better than a guess"""
_LEAST_WINDOW = 50
_NEAR = 0.01
"""of ln(vocabulary)"""


class LearningWatch:
    """Looks at the mean loss of each step, a window of steps at a time; a first window may be cut short by the end of
    the run."""

    def __init__(self, vocab_size: int, first_step: int, warmup_steps: int, last_step: int) -> None:
        self.guess = math.log(vocab_size)
        begin = max(first_step, warmup_steps)
        self._due = begin + min(WINDOW, max(_LEAST_WINDOW, last_step - begin))
        self._least, self._warned = math.inf, False

    def look(self, step: int, loss: float) -> str | None:
        """A warning at the end of a window without one loss below guessing, where the window before had one. step: that
        was just taken; loss: nats, or not finite."""
        if math.isfinite(loss):
            self._least = min(self._least, loss)
        if step < self._due:
            return None
        stuck, least, before = self._least > self.guess * (1 - _NEAR), self._least, self._warned
        self._due, self._least, self._warned = step + WINDOW, math.inf, stuck
        if not stuck or before:
            return None
        return (
            f"WARNING: up to step {step} the least loss of the last steps is {least:.4f}; guessing all tokens alike "
            f"costs ln(vocabulary) = {self.guess:.4f}: the model learns nothing; try a lower --optimizer.lr, and look "
            f"at what --train.freeze and --data.train leave to learn"
        )
