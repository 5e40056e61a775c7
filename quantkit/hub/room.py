"""Whether the disk holds what a conversion from the Hub writes and what it fetches meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.hub.folder import HubFolder
from quantkit.hub.session import Place
from quantkit.run.events import size


def require_room(place: Place, folder: Path, n_output: int, n_source: int) -> None:
    """Refuse to start where the output and the spool together do not fit.

    `n_output` bytes are still to be written to `folder`, in which the spool lies, and `n_source`
    are read of the place. Of a place on this machine nothing is fetched: its writer looks itself.
    """
    if isinstance(place, Path):
        return
    repository = place if isinstance(place, HubFolder) else place.folder
    n_spool = repository.still_to_spool(n_source)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < n_output + n_spool:
        raise OutputError(
            f"{size(n_output)} of output and {size(n_spool)} of spool, "
            f"{size(n_output + n_spool)} together, are needed and {size(free)} are free",
            where=str(folder),
            hint="free some space, choose another folder with -o, or a smaller --spool",
        )
