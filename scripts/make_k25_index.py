"""Make a checkpoint with every name, shape and byte range of Kimi K2.5 and no weights.

    python scripts/make_k25_index.py OUT

64 shards, 208,550 tensors, 595 GB apparent; the files are sparse, so a few hundred MB of disk.
Weights read as zeros, except `weight_shape`, which holds what it should.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _kimi
import numpy as np
from _common import Entry, write_checkpoint


def make(out: Path, **text_fields: Any) -> None:
    """Write the checkpoint into the folder `out`; `text_fields` replace those of `text_config`."""
    config = _kimi.config(**text_fields)
    text, vision = config["text_config"], config["vision_config"]
    shards = [_kimi.layer_entries(text, layer) for layer in range(text["num_hidden_layers"])]
    shards += [
        _kimi.top_entries(text),
        _kimi.projector_entries(vision),
        _kimi.vision_entries(vision),
    ]

    def data(entry: Entry) -> bytes | None:
        if not entry.name.endswith(".weight_shape"):
            return None
        return np.array(_kimi.weight_shape(text, entry.name), "<i4").tobytes()

    write_checkpoint(out, shards, data, _kimi.SHARD_NAME)
    _kimi.write_aux_files(out, config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Kimi K2.5 checkpoint without weights.")
    parser.add_argument("out", type=Path)
    make(parser.parse_args().out)
