"""llama.cpp itself as the engine: what a GGUF file computes, at llama-perplexity's settings.

Each open file has its own process, because llama.cpp aborts the process on some bad files. Needs
the `llama` extra; llama-perplexity and quantkit then differ in nothing but the build of llama.cpp.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.container.names import escaped
from quantkit.errors import GgufError, QuantkitError, UsageError
from quantkit.evaluate.llamacpp_child import NOT_USABLE, REFUSED
from quantkit.evaluate.logits_file import BaseFile, LogitsWriter
from quantkit.evaluate.scores import Scores, TileScorer
from quantkit.evaluate.summary import scored_positions, targets_of, with_bos
from quantkit.run.closing import Closing

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

_LOG_END = 1 << 16  # bytes of llama.cpp's log that are looked at
_QUOTED = 6  # lines of it that an error ends with
_TILE = 8192  # columns that the scorer is given at once


class LlamaCpp(Closing):
    """A GGUF file, or the first of its shards, open in a process of its own. A context manager.

    `n_ctx` is the length of a chunk, `n_vocab` the width of the logits, `bos` the token that
    llama-perplexity puts at the start of each chunk (None where the vocabulary adds none).
    `kv_f32` keeps keys and values in F32 and turns flash attention off.

    Raises `UsageError` where xllamacpp is missing or is another build, and `GgufError` with the
    end of llama.cpp's log where it refuses the file, at once or later.
    """

    def __init__(
        self,
        gguf: str | Path,
        *,
        threads: int,
        n_ctx: int = 512,
        kv_f32: bool = False,
        n_gpu_layers: int = 0,
    ) -> None:
        self.gguf = Path(gguf)
        self.n_ctx = n_ctx
        if find_spec("xllamacpp") is None:
            raise UsageError("xllamacpp is not installed", hint="pip install 'quantkit[llama]'")
        if not self.gguf.is_file():
            raise GgufError("no such file", where=escaped(str(self.gguf)))
        self._start()
        opening = {
            "gguf": str(self.gguf.resolve()),
            "n_ctx": n_ctx,
            "threads": threads,
            "kv_f32": kv_f32,
            "n_gpu_layers": n_gpu_layers,
        }
        try:
            facts = json.loads(self._ask(opening))
        except BaseException:
            self.close()
            raise
        self.n_vocab: int = facts["n_vocab"]
        self.bos: int | None = facts["bos"]

    def logits(self, ids: I32, first: int = 0) -> F32:
        """Logits of positions `first`... of a chunk, f32 [len(ids) - first, n_vocab].

        `ids` [up to n_ctx] are what the model sees: see `summary.with_bos`.
        """
        if len(ids) > self.n_ctx or not 0 <= first < len(ids):
            raise ValueError(f"{len(ids)} tokens from position {first}, in chunks of {self.n_ctx}")
        data = self._ask({"ids": ids.tolist(), "first": first})
        return np.frombuffer(data, np.float32).reshape(len(ids) - first, self.n_vocab)

    def tokenize(self, text: str) -> I32:
        """Token ids of a whole text, as llama-perplexity has them; special tokens are text."""
        return np.frombuffer(self._ask({"text": text}), np.int32)

    def chunks(self, text: str) -> I32:
        """A text's tokens cut into chunks i32 [n_chunks, n_ctx]; the rest is dropped."""
        ids = self.tokenize(text)
        n_chunks = len(ids) // self.n_ctx
        if not n_chunks:
            raise UsageError(f"the text has {len(ids)} tokens, fewer than a chunk of {self.n_ctx}")
        return ids[: n_chunks * self.n_ctx].reshape(n_chunks, self.n_ctx)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._answers.close()
        self._log.close()

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        read_end, write_end = os.pipe()
        self._answers = os.fdopen(read_end, "rb")
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "quantkit.evaluate.llamacpp_child", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[write_end],
                env={**os.environ, "PYTHONPATH": path},
            )
        finally:
            os.close(write_end)

    def _ask(self, request: dict[str, Any]) -> bytearray:
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            raise ValueError("closed")
        try:
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError as error:
            raise self._refusal() from error
        head = self._answers.read(8)
        answer = bytearray(int.from_bytes(head, "little"))
        if len(head) < 8 or self._answers.readinto(answer) < len(answer):
            raise self._refusal()
        return answer

    def _refusal(self) -> QuantkitError:
        """Why the process has ended."""
        status = self._process.wait()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_END))
        lines = self._log.read().decode(errors="replace").splitlines()
        if status == NOT_USABLE:
            message, hint = json.loads(lines[-1])
            return UsageError(message, hint=hint)
        if status >= 0 and status != REFUSED:
            raise RuntimeError("\n".join(["the llama.cpp process failed", *lines[-30:]]))
        ending = f" (signal {-status})" if status < 0 else ""
        words = "\n  ".join(escaped(line) for line in lines[-_QUOTED:])
        return GgufError(
            f"llama.cpp gave up{ending}; its last words:\n  {words}",
            where=escaped(str(self.gguf)),
        )


def score_with_llamacpp(
    base: str | Path | BaseFile,
    quants: Sequence[str | Path],
    chunks: I32,
    *,
    threads: int,
    kv_f32: bool = False,
    n_gpu_layers: int = 0,
    on_chunk: Callable[[int], None] = lambda n_done: None,
) -> Scores:
    """Score GGUF files against a base over `chunks` i32 [n_chunks, n_ctx].

    All models are open at once and evaluate the same chunk in turn, so that the logits of one
    chunk and two models are all that is held. For models too large for that, `save_base` once and
    give the `BaseFile` and its tokens here, one quant at a time: then the figures are those that
    llama-perplexity gets from the file's 16 bits. Without quants, only the base is scored.
    `on_chunk` is told how many chunks are done.
    """
    n_ctx = chunks.shape[1]
    if isinstance(base, BaseFile) and not np.array_equal(base.tokens, chunks):
        raise UsageError("its tokens are not those of the text", where=base.where)
    with ExitStack() as stack:

        def engine(path: str | Path) -> LlamaCpp:
            opened = LlamaCpp(
                path, threads=threads, n_ctx=n_ctx, kv_f32=kv_f32, n_gpu_layers=n_gpu_layers
            )
            return stack.enter_context(opened)

        source = base if isinstance(base, BaseFile) else engine(base)
        engines = [engine(path) for path in quants]
        for quant in engines:
            if quant.n_vocab != source.n_vocab:
                raise UsageError(
                    f"its vocabulary has {quant.n_vocab} tokens, the base model's {source.n_vocab}",
                    where=escaped(str(quant.gguf)),
                )
        parts = []
        for number, chunk in enumerate(chunks):
            targets = targets_of(chunk[None])
            rows = _rows(source, number, chunk)
            fixed = isinstance(source, BaseFile)
            scores = [
                _score(targets, rows, [_rows(quant, number, chunk)], fixed) for quant in engines
            ]
            parts.append(Scores.stack(scores or [_score(targets, rows, [], fixed)]))
            on_chunk(number + 1)
    return Scores.join(parts)


def save_base(engine: LlamaCpp, chunks: I32, path: str | Path) -> None:
    """Write a model's log-probabilities over `chunks` i32 [n_chunks, n_ctx] as a base file."""
    n_rows = len(scored_positions(chunks.shape[1]))
    with LogitsWriter(path, chunks, engine.n_vocab) as writer:
        for number, chunk in enumerate(chunks):
            writer.write_rows(number * n_rows, _rows(engine, number, chunk))
        writer.commit()


def _rows(source: LlamaCpp | BaseFile, number: int, chunk: I32) -> F32:
    """Logits or log-probabilities of a chunk's scored positions, f32 [n_scored, n_vocab]."""
    if isinstance(source, BaseFile):
        return source.chunk(number)
    positions = scored_positions(len(chunk))
    (ids,) = with_bos(chunk[None], source.bos)
    return source.logits(ids, positions.start)[: len(positions)]


def _score(targets: NDArray[np.int64], base: F32, quants: list[F32], fixed: bool) -> Scores:
    scorer = TileScorer(targets, len(quants), base_is_log_probs=fixed)
    for first in range(0, base.shape[1], _TILE):
        tile, *others = (
            torch.from_numpy(rows[:, first : first + _TILE]) for rows in (base, *quants)
        )
        scorer.add(first, tile, others)
    return scorer.finish()
