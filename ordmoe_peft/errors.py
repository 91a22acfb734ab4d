"""Errors that a user can cause. Each is also the built-in that its kind suggests, so existing handlers catch it."""


class OrdMoEError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback.

    `status` is the exit status that the command line ends with.
    """

    status = 2


class OrdMoEConfigError(OrdMoEError, ValueError):
    """A setting has a value that cannot work."""


class OrdMoEModelError(OrdMoEError, ValueError):
    """The model has no part that was asked for, or a part of a kind that is not supported."""


class OrdMoEDataError(OrdMoEError, ValueError):
    """The data set lacks what the method needs."""


class OrdMoERuntimeError(OrdMoEError, RuntimeError):
    """Something happened in a forward pass that would make its result wrong."""


class OrdMoEInterrupted(OrdMoERuntimeError):
    """A run was told to end before its time. Its message says what is saved, and how to go on.

    Args:
        message (`str`): what happened.
        status (`int`): the exit status, 128 and the signal's number, as shells count: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status
