"""The one error for what is wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that is broken, or that does not fit: says where, what was expected and found.

    What the operating system reports (a full disk, a missing permission) stays an OSError.
    """
