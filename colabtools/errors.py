"""Every error that colabtools raises on purpose: one root, one class per kind of failure.

    ColabToolsError
    ├── ConfigError (ValueError)             a setting has a value that cannot work
    ├── WorkspaceError (OSError)             the folder for a user's files cannot be used
    │   ├── MountError (OSError)             Google Drive is refused, or cannot be mounted here
    │   ├── StorageFullError (OSError)       there is no room left
    │   └── StorageLostError (OSError)       Google Drive or the disk dropped out
    ├── SessionError (ValueError)            a training session is missing or broken
    │   └── SessionBusyError (ValueError)    another runtime is writing to it
    ├── DatasetError (ValueError)            the pictures or captions cannot be trained on
    ├── ImageError (ValueError)              a picture cannot be read, drawn or written
    ├── ModelError (ValueError)              a model is unknown, wrong for the job or will not load
    ├── CheckpointError (ValueError)         a weight file is damaged, unsafe or of an unknown kind
    ├── TrainingError (RuntimeError)         training cannot go on
    ├── ProcessError (RuntimeError)          a child process failed; `.log_tail` has its last lines
    ├── NotebookError (RuntimeError)         a notebook failed while it ran headless
    ├── MissingSecretError (LookupError)     a token is neither in Colab Secrets nor the environment
    └── MissingDependencyError (ImportError) an optional package is not installed

Each class also inherits the builtin that a caller would already catch. A message says what failed,
the value seen and what to do next, on one line.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ColabToolsError",
    "ConfigError",
    "DatasetError",
    "ImageError",
    "MissingDependencyError",
    "MissingSecretError",
    "ModelError",
    "MountError",
    "NotebookError",
    "ProcessError",
    "SessionBusyError",
    "SessionError",
    "StorageFullError",
    "StorageLostError",
    "TrainingError",
    "WorkspaceError",
]


class ColabToolsError(Exception):
    """Root of the tree: catch it to catch every failure that colabtools foresaw."""


class ConfigError(ColabToolsError, ValueError):
    """A setting has a value that cannot work; the message names the field."""


class WorkspaceError(ColabToolsError, OSError):
    """The folder for a user's files cannot be read, written or kept; `errno` is set if known."""


class MountError(WorkspaceError):
    """Google Drive is refused, or cannot be mounted here."""


class StorageFullError(WorkspaceError):
    """There is no room left; `errno` is ENOSPC or EDQUOT."""


class StorageLostError(WorkspaceError):
    """Google Drive or the disk dropped out; `errno` is EIO, ENOTCONN or ESTALE."""


class SessionError(ColabToolsError, ValueError):
    """A training session is missing or broken."""


class SessionBusyError(SessionError):
    """Another runtime is writing to the session; one that writes as well would ruin it."""


class DatasetError(ColabToolsError, ValueError):
    """The pictures or captions cannot be trained on."""


class ImageError(ColabToolsError, ValueError):
    """A picture cannot be read, drawn or written."""


class ModelError(ColabToolsError, ValueError):
    """A model is unknown, wrong for the job or will not load."""


class CheckpointError(ColabToolsError, ValueError):
    """A weight file is damaged, unsafe or of an unknown kind."""


class TrainingError(ColabToolsError, RuntimeError):
    """Training cannot go on."""


class ProcessError(ColabToolsError, RuntimeError):
    """A child process failed.

    Attributes:
        log_tail: the last lines that the child printed, secrets replaced by `***`.
    """

    def __init__(self, message: str, *, log_tail: str = "") -> None:
        """Keep the one-line message and, beside it, the end of the child's log."""
        super().__init__(message)
        self.log_tail = log_tail


class NotebookError(ColabToolsError, RuntimeError):
    """A notebook failed while it ran headless."""


class MissingSecretError(ColabToolsError, LookupError):
    """A token is neither in Colab Secrets nor in the environment."""


class MissingDependencyError(ColabToolsError, ImportError):
    """An optional package is not installed; the message has the command that installs it."""
