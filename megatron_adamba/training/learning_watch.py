"""A run that learns nothing, or loses what it learned, is told so: its loss is that of guessing all tokens alike."""

from __future__ import annotations

import math

WINDOW = 200
"""steps, behind the warm-up, in which one loss at least should be better than a guess"""
_LEAST_WINDOW = 50
_NEAR = 0.01
"""of ln(vocabulary)"""
_FALLEN = 10
"""steps in a row no better than a guess, after better ones, that are no accident of their texts"""


class LearningWatch:
    """Looks at the mean loss of each step, a window of steps at a time; a first window may be cut short by the end of
    the run."""

    def __init__(self, vocab_size: int, first_step: int, warmup_steps: int, last_step: int) -> None:
        self.guess = math.log(vocab_size)
        begin = max(first_step, warmup_steps)
        self._due = begin + min(WINDOW, max(_LEAST_WINDOW, last_step - begin))
        self._least, self._warned = math.inf, False
        self._best, self._fallen = math.inf, 0

    @property
    def sound(self) -> bool:
        """Whether the last step was not one that is back at guessing, after better ones."""
        return not self._fallen

    def look(self, step: int, loss: float) -> str | None:
        """A warning at the end of a window without one loss below guessing, where the window before had one, or after
        some steps back at guessing. step: that was just taken; loss: nats, or not finite."""
        if math.isfinite(loss):
            self._least = min(self._least, loss)
            if fall := self._fall(loss):
                return fall
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

    def _fall(self, loss: float) -> str | None:
        bar = self.guess * (1 - _NEAR)
        self._fallen = self._fallen + 1 if self._best < bar <= loss else 0
        self._best = min(self._best, loss)
        if self._fallen != _FALLEN:
            return None
        return (
            f"WARNING: the loss was {self._best:.4f} and is now {loss:.4f}; guessing all tokens alike costs "
            f"ln(vocabulary) = {self.guess:.4f}: the weights are ruined; no checkpoint is deleted while it stays so: "
            f"stop the run, and go on from an earlier one with a lower --optimizer.lr"
        )
