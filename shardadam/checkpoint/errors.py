"""The error for what is wrong with a checkpoint, and kinds of it."""


class CheckpointError(ValueError):
    """A checkpoint that is broken, or that does not fit: says where, what was expected and found.

    What the operating system reports (a full disk, a missing permission) stays an OSError.
    """


class NoCheckpoint(CheckpointError):
    """The directory has none, whole or broken: a run that is new."""


class OtherVersion(CheckpointError):
    """Its format is of another version: it may well be whole, so none that is older replaces it."""
