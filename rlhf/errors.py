"""The errors a user can cause. Each is shown as one message without a traceback; anything else is a bug of ours."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. The message names the key, file or line, the value, and the rule."""


class ConfigError(UserError, ValueError):
    """A setting that is unknown, of the wrong type, out of range, or impossible together with another."""


class FolderInUse(ConfigError):
    """The folder holds a run that the command can't go on with. That run stays as it is."""


class DataError(UserError, ValueError):
    """A row or file of a dataset that can't be used; names file, line and reason."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is missing, damaged, incomplete, or of another model; names path and array."""


class TrainingError(UserError, RuntimeError):
    """A run that can't go on: a loss that is not finite, a compilation that was forbidden."""


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: those that look most like it, or all of them when none does."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(prefix + c for c in close)}?"
    return f"; there are: {', '.join(names)}" if names else ""
