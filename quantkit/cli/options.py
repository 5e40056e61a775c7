"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from quantkit.errors import UsageError
from quantkit.hub.ref import parse_ref
from quantkit.run import sizes
from quantkit.run.names import is_plain_name
from quantkit.types import GgmlType

if TYPE_CHECKING:
    from quantkit.hub.session import HubSession
    from quantkit.run.cluster import Connected
    from quantkit.run.events import Reporter

F = TypeVar("F", bound=Callable[..., Any])
Rounding = Literal["nearest", "feedback"]

MODEL = parse_ref  # an argument's type: a local path, or a place on the Hub
_MAX_STEM = 150  # bytes; a file's name has at most 255


def parse_size(text: str) -> int:
    """A size in bytes: 49GB, 1.5GiB, or a plain number."""
    try:
        return sizes.parse_size(text)
    except UsageError:
        wanted = "a size such as 49GB, 1.5GiB or 1000000"
        raise click.BadParameter(f"{text!r} is not {wanted}") from None


def _plain_name(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    """A name that leads nowhere, and leaves room for the recipe's and for endings."""
    if name is not None and (not is_plain_name(name) or len(name.encode()) > _MAX_STEM):
        raise click.BadParameter(f"no plain name of up to {_MAX_STEM} bytes: {name[:80]!r}")
    return name


def job_options(command: F) -> F:
    """MODEL and everything that decides what the files will be."""
    for option in reversed(
        (
            click.argument("model", type=MODEL),
            click.option(
                "-r", "--recipe", required=True, help="A shipped recipe's name, or a .yaml file."
            ),
            click.option(
                "--rounding",
                type=click.Choice(["nearest", "feedback"]),
                help="Overrule the recipe: feedback runs the model on text and rounds each weight "
                "by its inputs. Slower, lower KL divergence at the same size.",
            ),
            click.option(
                "--name",
                callback=_plain_name,
                help="Stem of the file names; default: the model's own name.",
            ),
            click.option(
                "--mmproj",
                type=click.Choice(["f16", "bf16", "f32", "none"]),
                default="f16",
                show_default=True,
                help="Type of the vision file, where a checkpoint has a vision tower.",
            ),
            click.option(
                "--max-shard-size",
                type=parse_size,
                metavar="SIZE",
                default="49GB",
                show_default=True,
                help="Upper bound of a file's size; the Hub takes files below 50 GB.",
            ),
            click.option("--max-shard-tensors", type=click.IntRange(min=1), hidden=True),
        )
    ):
        command = option(command)
    return command


def hub_options(command: F) -> F:
    """How a MODEL on the Hub is read, collected in `hub`; see `on_hub`."""
    options = (
        click.option(
            "--revision", metavar="REV", help="Branch, tag or commit of a MODEL on the Hub."
        ),
        click.option(
            "--spool",
            type=parse_size,
            metavar="SIZE",
            default="30GB",
            show_default=True,
            help="Most disk for what is fetched of a MODEL on the Hub.",
        ),
    )
    return _collected("hub", ("revision", "spool"), options)(command)


@contextmanager
def on_hub(
    hub: dict[str, Any],
    view: Reporter,
    work: Path | None = None,
    *,
    restart: bool = False,
) -> Iterator[HubSession]:
    """What opens a MODEL inside the `with` block, local or on the Hub.

    What is fetched is kept in `work`/.hub until the block is left well, without `work` in a
    temporary folder.
    """
    from quantkit.hub.session import HubSession

    with HubSession(view, work, restart=restart, **hub) as session:
        yield session


def importance_options(command: F) -> F:
    """Where importance statistics come from, collected in `importance`."""
    options = (
        click.option(
            "--imatrix",
            type=click.Path(path_type=Path),
            help="Importance statistics, of `quantkit calibrate` or llama-imatrix.",
        ),
        click.option(
            "--corpus",
            metavar="NAME|FILE",
            default="core",
            show_default=True,
            help="Text for rounding with feedback, and where a low-bit recipe has no imatrix.",
        ),
        click.option(
            "--calibration-tokens",
            "budget",
            type=click.IntRange(min=1),
            help="How much of it; default: 131,072 for rounding with feedback, else 32,768.",
        ),
        click.option("--no-imatrix", is_flag=True, help="Do without: all columns count alike."),
    )

    def prepared(values: dict[str, Any]) -> dict[str, Any]:
        if values.pop("no_imatrix"):
            if values["imatrix"] is not None:
                raise click.UsageError("--imatrix and --no-imatrix exclude each other.")
            values["corpus"] = None
        return values

    names = ("imatrix", "corpus", "budget", "no_imatrix")
    return _collected("importance", names, options, prepared)(command)


def memory_option(command: F) -> F:
    """A bound for what is in work, in bytes, or None."""
    return click.option(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="Bound of what is in work, beside the program (512 MiB): tiles, and for rounding with "
        "feedback its statistics and hidden states. Default: what all threads take.",
    )(command)


def cluster_options(command: F) -> F:
    """Where the work is done, collected in `cluster`; see `on_cluster`."""
    options = (
        click.option(
            "--executor",
            metavar="threads|ray|ray://HOST:PORT",
            default="threads",
            show_default=True,
            callback=_executor,
            help="Threads of this process, or workers through Ray: on the cluster at this address "
            "or in RAY_ADDRESS, else on this machine. --threads are then those of each worker.",
        ),
        click.option(
            "--workers",
            "n_workers",
            type=click.IntRange(min=1),
            help="How many; default: one on each machine, or for each GPU.",
        ),
    )
    return _collected("cluster", ("executor", "n_workers"), options)(command)


def _executor(context: click.Context, option: click.Parameter, text: str) -> str:
    if text not in ("threads", "ray") and not text.startswith("ray://"):
        raise click.BadParameter(f"threads, ray or ray://HOST:PORT, not {text!r}")
    return text


@contextmanager
def on_cluster(
    cluster: dict[str, Any], threads: int | None, device: str, view: Reporter
) -> Iterator[Connected | None]:
    """The cluster that was asked for, connected inside the block; None for threads."""
    if cluster["executor"] == "threads":
        if cluster["n_workers"] is not None:
            raise click.UsageError("--workers goes with --executor ray.")
        yield None
        return
    from quantkit.run.cluster import Cluster, connected

    address = None if cluster["executor"] == "ray" else cluster["executor"]
    wanted = Cluster(address, cluster["n_workers"], threads, gpus=device.startswith("cuda"))
    with connected(wanted) as found:
        view.stage("cluster", str(found))
        yield found


def mmproj_type(name: str) -> GgmlType | None:
    """The type behind `--mmproj`."""
    return None if name == "none" else GgmlType[name.upper()]


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_options(default: str | None) -> Callable[[F], F]:
    """What text to run, collected in `reading`; `default` is the corpus where none is named."""
    options = (
        click.option(
            "--corpus",
            "--text",
            metavar="NAME|FILE",
            default=default,
            show_default=default is not None,
            help="A shipped corpus, a corpus .yaml, a text or JSONL file, or saved tokens.",
        ),
        click.option("--budget", type=click.IntRange(min=1), help="Most tokens to take."),
        click.option(
            "-c",
            "--ctx-size",
            "n_ctx",
            type=click.IntRange(min=4),
            default=512,
            show_default=True,
            help="Tokens per chunk.",
        ),
        click.option(
            "--parse-special/--no-parse-special",
            default=None,
            help="Whether the text of special tokens means them; default: as the corpus says.",
        ),
    )
    return _collected("reading", ("corpus", "budget", "n_ctx", "parse_special"), options)


def running_options(command: F) -> F:
    """How models are run, collected in `running`, and `threads`."""
    options = (
        click.option(
            "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ... or auto."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["f32", "bf16"]),
            default="f32",
            show_default=True,
            help="What products are computed in.",
        ),
        click.option(
            "--activations",
            type=click.Choice(["llama.cpp", "exact"]),
            default="llama.cpp",
            show_default=True,
            help="Round activations and the cache as llama.cpp's CPU backend does, or not at all.",
        ),
        click.option(
            "--constants",
            type=click.Choice(["llama.cpp", "config"]),
            default="llama.cpp",
            show_default=True,
            help="Where the two disagree: YaRN's beta_fast and the epsilon of MLA's latents.",
        ),
        click.option(
            "--memory",
            type=parse_size,
            metavar="SIZE",
            default="1GiB",
            show_default=True,
            help="For hidden states; what does not fit goes to disk.",
        ),
    )
    names = ("device", "dtype", "activations", "constants", "memory")
    command = click.option(
        "-t", "--threads", type=click.IntRange(min=1), help="Threads; default: all cores."
    )(command)
    return _collected("running", names, options)(command)


def use_threads(n_threads: int) -> None:
    """Let torch use so many threads, if it is there."""
    from quantkit.text.extras import require

    require("torch").set_num_threads(n_threads)


def _collected(
    into: str,
    names: tuple[str, ...],
    options: tuple[Callable[[F], F], ...],
    prepared: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Callable[[F], F]:
    """Options whose values arrive as one dictionary, the argument `into`."""

    def decorate(command: F) -> F:
        @wraps(command)
        def collect(*args: Any, **kwargs: Any) -> Any:
            kwargs[into] = prepared({name: kwargs.pop(name) for name in names})
            return command(*args, **kwargs)

        decorated: Any = collect
        for option in reversed(options):
            decorated = option(decorated)
        return cast(F, decorated)

    return decorate
