"""Every way a run can fail: one class per cause, each with its exit code.

| code | meaning |
|------|---------|
| 0 | done |
| 1 | a bug in quantkit (a traceback is printed; please report it) |
| 2 | wrong use: unknown option, recipe or key |
| 3 | the source checkpoint is damaged, incomplete or hostile |
| 4 | the source is sound but not supported (family, format, tokenizer) |
| 5 | the output could not be written (disk full, permission, in use) |
| 6 | a GGUF file or shard set is damaged or inconsistent |
| 7 | weights or scales hold NaN or infinity |
| 8 | the Hub cannot be reached, or refuses |
| 9 | the cluster cannot be reached, or loses its workers; the run can be continued |
| 10 | the GPU fails or has too little memory; the run can be continued |
| 129 / 130 / 143 | interrupted (SIGHUP / SIGINT / SIGTERM); the run can be continued |
| 141 | nobody reads the output any more; the run can be continued |
"""

from __future__ import annotations


class QuantkitError(Exception):
    """A failure with a cause that the user can act on.

    `where` names the file and, where there is one, the tensor; `hint` says what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  {self.hint}" if self.hint else text


class UsageError(QuantkitError):
    """An option or argument that cannot be meant."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not exist, does not parse or holds an unknown key."""


class SourceError(QuantkitError):
    """The checkpoint's files contradict themselves or each other."""

    exit_code = 3


class UnsupportedError(QuantkitError):
    """A sound checkpoint of a family, format or tokenizer that quantkit does not know."""

    exit_code = 4


class OutputError(QuantkitError):
    """The output folder refuses: no space, no permission, or another run is using it."""

    exit_code = 5


class GgufError(QuantkitError):
    """A GGUF file that breaks the format, or shards that do not belong together."""

    exit_code = 6


class NonFiniteError(QuantkitError):
    """NaN or infinity among the weights, scales or statistics."""

    exit_code = 7


class HubError(QuantkitError):
    """The Hugging Face Hub cannot be reached, refuses, or lacks what is asked for."""

    exit_code = 8


class ClusterError(QuantkitError):
    """The cluster cannot be reached, has no room, or its workers are lost again and again."""

    exit_code = 9


class DeviceError(QuantkitError):
    """A GPU that torch found fails, has too little memory, or does not fit torch or the driver."""

    exit_code = 10
