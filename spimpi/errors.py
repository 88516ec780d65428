"""The exceptions of spimpi, each with the exit status that it gives the command line."""


class SpimpiError(Exception):
    """Base of all errors that spimpi raises on purpose."""

    exit_status = 4


class UsageError(SpimpiError, ValueError):
    """What was asked for cannot be done: wrong arguments, files or environment."""

    exit_status = 2


class ArgumentKindError(UsageError, TypeError):
    """An argument is of another kind than it takes; a TypeError too."""


class MissingDependency(UsageError, ImportError):
    """An optional package is needed; the message says which and how to install it."""


class CorruptionError(SpimpiError):
    """A check failed. Raised on every rank of the communicator that the check ran on."""

    exit_status = 1

    def __init__(self, verdict):
        super().__init__(str(verdict))
        self.verdict = verdict

    def __reduce__(self):  # a copy, or one sent to another process, carries the verdict too
        return type(self), (self.verdict,)


class IncompleteError(SpimpiError):
    """Something that was asked for could not be established."""

    exit_status = 3


class UncheckedWarning(UserWarning):
    """A checked communicator passed a call on without a check. ``warnings`` can make it an error."""
