"""The command line: one file per command, imported when it is called."""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module
from types import FrameType

import click

from quantkit import __version__
from quantkit.errors import OutputError, QuantkitError

# command -> (module, attribute, one line for --help); imports wait until a command is called
_COMMANDS = {
    "convert": ("convert", "convert_command", "Convert a checkpoint into GGUF shards."),
    "plan": ("plan", "plan_command", "Show what a conversion would write, from metadata alone."),
    "calibrate": ("calibrate", "calibrate_command", "Measure which weights matter: an imatrix."),
    "imatrix": ("imatrix", "imatrix_command", "Show, merge and convert imatrix files."),
    "evaluate": (
        "evaluate",
        "evaluate_command",
        "Perplexity, KL divergence and answers of GGUF files.",
    ),
    "allocate": ("allocate", "allocate_command", "Find the recipe that loses least at a size."),
    "guide": ("guide", "guide_command", "Tell how a model runs on a machine, with commands."),
    "publish": ("publish", "publish_command", "Publish converted models on the Hugging Face Hub."),
    "inspect": ("inspect", "inspect_command", "List the metadata and tensors of a GGUF file."),
    "verify": ("verify", "verify_command", "Check a GGUF file or shard set, byte by byte."),
    "families": ("families", "families_command", "List the model families that are known."),
    "doctor": ("doctor", "doctor_command", "Say what limits a job here, and what it will take."),
    "recipes": ("recipes", "recipes_command", "List the recipes that come with quantkit."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"quantkit.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantkit")
def cli() -> None:
    """Stream large safetensors checkpoints into GGUF shards for llama.cpp.

    \b
    quantkit plan MODEL --recipe q4_x               what it will be, and how big
    quantkit convert MODEL --recipe q4_x -o out/    make it; run again to continue
    quantkit calibrate MODEL -o imatrix.gguf        which weights matter
    quantkit evaluate MODEL out/*.gguf --text FILE  how far the files are from it
    quantkit verify out/MODEL-Q4_X.gguf             check what was written

    Exit codes: 0 done, 2 wrong use, 3 damaged source, 4 unsupported model, 5 cannot write,
    6 damaged GGUF, 7 NaN or infinity in the weights, 8 the Hub is out of reach or refuses,
    9 the cluster is out of reach or loses its workers, 10 the GPU fails or lacks memory,
    129/130/143 interrupted by SIGHUP/SIGINT/SIGTERM, 141 nobody reads the output any more.
    """


_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class _Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP, as an exception so that files and threads are left in order.

    Not a KeyboardInterrupt: Python kills a program at its very end where one of those passed
    through code made from a string (dataclasses, numba), even if it was caught.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _interrupt(number: int, frame: FrameType | None) -> None:
    if client := sys.modules.get("quantkit.hub.client"):
        client.interrupted.set()
    raise _Interrupted(number)


def main() -> None:
    """Entry point: every failure is one message and a documented exit code."""
    _open_standard_streams()
    stdout = sys.stdout
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or "&" in a script
            signal.signal(number, _interrupt)
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:  # a question was left unanswered
        code = _say_interrupted(130)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except QuantkitError as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        code = error.exit_code
    except RuntimeError as error:
        code = _say_device(error)
    except _Interrupted as interrupted:
        code = _say_interrupted(interrupted.exit_code)
    except OSError as error:
        code = _say_no_output(error)
    except SystemExit as end:  # a command's; or click's, for a pipe that nobody reads
        gone = sys.stdout is not stdout
        code = _say_no_output(BrokenPipeError()) if gone else end.code
    # All is said and done: a signal while the interpreter folds up must not change the exit code.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code if isinstance(code, int) else 0)


def _open_standard_streams() -> None:
    """Where a standard stream is closed, the next file would take its number, and its messages."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _say_no_output(error: OSError) -> int:
    """What is printed cannot be: the reader has gone, or a disk is full. Else it is a bug."""
    if isinstance(error, BrokenPipeError):
        code = 128 + 13  # as a shell tells of a program that SIGPIPE ended
    elif error.errno in _DISK_ERRORS:
        click.echo(f"error: {printable(str(error.strerror))}", err=True)
        code = OutputError.exit_code
    else:
        raise error
    # What is still buffered must not fail again at the very end.
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _say_device(error: RuntimeError) -> int:
    """A GPU's failure, if torch is there and it is one. Else it is a bug."""
    if "torch" in sys.modules:
        from quantkit.quantize.torch.devices import device_error

        if known := device_error(error):
            click.echo(f"error: {printable(str(known))}", err=True)
            return known.exit_code
    raise error


def printable(text: str) -> str:
    """Without what could forge or hide anything on a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _say_interrupted(code: int) -> int:
    click.echo("interrupted; run the same command again to continue", err=True)
    return code
