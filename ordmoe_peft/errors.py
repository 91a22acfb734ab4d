"""Errors that a user can cause. Each is also the built-in that its kind suggests, so existing handlers catch it."""


class OrdMoEError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it without a traceback."""


class OrdMoEConfigError(OrdMoEError, ValueError):
    """A setting has a value that cannot work."""


class OrdMoEModelError(OrdMoEError, ValueError):
    """The model has no part that was asked for, or a part of a kind that is not supported."""


class OrdMoEDataError(OrdMoEError, ValueError):
    """The data set lacks what the method needs."""


class OrdMoERuntimeError(OrdMoEError, RuntimeError):
    """Something happened in a forward pass that would make its result wrong."""
