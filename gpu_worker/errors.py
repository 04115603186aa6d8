"""What can be wrong outside of this code, one type per kind; the text is for whoever started the worker."""


class WorkerError(Exception):
    """The worker cannot do its work; `exit_code` is the process's."""

    exit_code = 70


class ConfigError(WorkerError):
    """An argument is out of range or asks for something that is not offered; the text names it."""

    exit_code = 64


class CheckpointError(WorkerError):
    """The checkpoint is missing, broken or not supported; the text names file and field."""

    exit_code = 65


class PlanError(WorkerError):
    """A plan contradicts the slot table: scheduler and worker no longer agree, or one of them has a bug."""
