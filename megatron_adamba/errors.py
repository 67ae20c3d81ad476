"""What users see when something is wrong: one class per kind of failure, each with its own exit code.

A message is one line: it names the flag, file or tensor, the rule, and a value that works.
"""


class AdambaError(Exception):
    """Base of every failure that is the user's to mend; scripts print it as one line and exit with `exit_code`."""

    exit_code = 1


class ConfigError(AdambaError, ValueError):
    """A flag, preset, config file or combination of settings that cannot be used."""

    exit_code = 2


class DataError(AdambaError, ValueError):
    """A dataset or corpus that is missing, empty, truncated or not what its index says."""

    exit_code = 3


class TokenizerError(AdambaError, ValueError):
    """A tokenizer that cannot be read, or is not the one the data was made with."""

    exit_code = 4


class CheckpointError(AdambaError):
    """A checkpoint that is missing, damaged, or does not belong to this model."""

    exit_code = 5


class StorageError(AdambaError, OSError):
    """The disk is full or refuses to be written to; what was there before is still there."""

    exit_code = 6


class NonFiniteError(AdambaError):
    """The loss or the gradients stayed infinite or not-a-number for too many steps in a row."""

    exit_code = 7


class LostRankError(AdambaError):
    """Other ranks of the job are gone; the last checkpoint is what a new job goes on from."""

    exit_code = 9

    def __init__(self, text: str, first_survivor: bool = True) -> None:
        super().__init__(text)
        self.first_survivor = first_survivor
        """whether this rank is the one that tells the user"""


class StoppedBySignal(AdambaError):
    """SIGTERM or SIGINT: the run saved itself and can be resumed."""

    exit_code = 8
