"""The file that llama-perplexity writes and reads as `--kl-divergence-base`.

Little endian, no padding:

    "_logits_" | i32 n_ctx | i32 n_vocab | i32 n_chunks | i32 tokens[n_chunks, n_ctx]
    then a record per scored position, n_ctx - 1 - n_ctx // 2 of each chunk:
    f32 scale | f32 least log-probability | u16 code[n_vocab] | u16 0 where n_vocab is odd

A log-probability is scale * code + least. Codes span the logits from the maximum down to 16 below
it, whatever lies deeper has code 0. All arithmetic is f32 with each operation rounded, as in a
build of llama.cpp for x86-64; one that fuses multiply and add may differ by a unit in some codes.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from stat import S_ISREG

import numpy as np
from numpy.typing import NDArray

from quantkit.container.names import escaped
from quantkit.errors import NonFiniteError, SourceError, UsageError
from quantkit.evaluate.summary import scored_positions
from quantkit.run import fs
from quantkit.run.closing import Closing

F32 = NDArray[np.float32]
U16 = NDArray[np.uint16]

MAGIC = b"_logits_"
MAX_N_CTX = 1 << 24
MAX_N_VOCAB = 1 << 24

_HEAD = struct.Struct("<8siii")
_DEPTH = np.float32(16)
_TOP = np.float32(65535)
_OVER = 1e-3  # how far above 0 rounding may take a log-probability, nats


def _record_words(n_vocab: int) -> int:
    """u16 words of one record."""
    return 4 + n_vocab + n_vocab % 2


class RecordEncoder:
    """Records of `n_rows` positions from vocabulary tiles, in two passes over the same tiles.

    First `measure` every tile, then `encode` every tile, then `heads`. Tiles are f32 [n_rows, v],
    in any order, each column once per pass. -inf is taken as a token without probability; NaN,
    +inf and rows that are all -inf are a `NonFiniteError`.
    """

    def __init__(self, n_rows: int) -> None:
        self._max: F32 = np.full(n_rows, -np.inf, np.float32)
        self._min: F32 = np.full(n_rows, np.inf, np.float32)
        self._sum = np.zeros(n_rows)

    def measure(self, tile: F32) -> None:
        """First pass."""
        np.maximum(self._max, tile.max(axis=1), out=self._max)
        np.minimum(self._min, tile.min(axis=1), out=self._min)

    def encode(self, tile: F32) -> U16:
        """Second pass: the codes of the tile, u16 [n_rows, v]."""
        if not np.isfinite(self._max).all():
            row = int(np.flatnonzero(~np.isfinite(self._max))[0])
            raise NonFiniteError(f"the logits of row {row} hold NaN, infinity or nothing else")
        # exp rounded to f32 before it is summed in f64, as expf gives it there.
        shifted = (tile - self._max[:, None]).astype(np.float64)
        self._sum += np.exp(shifted).astype(np.float32).sum(axis=1, dtype=np.float64)
        least, scale = self._least(), self._scale()
        usable = scale >= np.finfo(np.float32).tiny  # else its reciprocal may overflow
        inverse = np.zeros_like(scale)
        np.divide(np.float32(1), scale, out=inverse, where=usable)
        steps = inverse[:, None] * np.maximum(tile - least[:, None], np.float32(0))
        codes: U16 = np.rint(steps).astype(np.uint16)
        return codes

    def heads(self) -> U16:
        """Scale and least log-probability of each record, as u16 words [n_rows, 4]."""
        log_sum = np.log(self._sum).astype(np.float32)
        least_log_prob = self._least() - self._max - log_sum
        return np.stack([self._scale(), least_log_prob], axis=1).astype("<f4").view("<u2")

    def _least(self) -> F32:
        return np.maximum(self._min, self._max - _DEPTH)

    def _scale(self) -> F32:
        scale: F32 = (self._max - self._least()) / _TOP
        return scale


class LogitsWriter(Closing):
    """Writes a base file under a temporary name; `commit` gives it its own. A context manager.

    `tokens` i32 [n_chunks, n_ctx] are the text's own, before BOS replaces any. Rows are numbered
    over the whole file: row r is scored position r % n_scored of chunk r // n_scored.
    """

    def __init__(self, path: str | Path, tokens: NDArray[np.integer], n_vocab: int) -> None:
        self.path = Path(path)
        self.n_vocab = n_vocab
        n_chunks, n_ctx = tokens.shape
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= n_vocab:
            raise UsageError(f"no tokens, or some outside the vocabulary of {n_vocab}")
        self.n_rows = n_chunks * len(scored_positions(n_ctx))
        self._words = _record_words(n_vocab)
        head = _HEAD.pack(MAGIC, n_ctx, n_vocab, n_chunks) + tokens.astype("<i4").tobytes()
        self._begin = len(head)
        self._words_of_row = np.zeros(self.n_rows, np.int64)
        partial = fs.partial_of(self.path)
        n_bytes = self._begin + 2 * self._words * self.n_rows
        fs.require_space(self.path.parent, n_bytes, fs.allocated(partial))
        fs.remove(partial)
        self._fd = fs.open_sized(partial, n_bytes)
        fs.write_at(self._fd, head, 0, self.path)

    def close(self) -> None:
        """Close; what was not committed is removed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            fs.remove(fs.partial_of(self.path))

    def write_rows(self, first_row: int, logits: F32) -> None:
        """Write whole rows, f32 [n, n_vocab]."""
        encoder = RecordEncoder(len(logits))
        encoder.measure(logits)
        records = np.zeros((len(logits), self._words), "<u2")
        records[:, 4 : 4 + self.n_vocab] = encoder.encode(logits)
        records[:, :4] = encoder.heads()
        self._words_of_row[first_row : first_row + len(logits)] += 4 + logits.shape[1]
        self._write(first_row, 0, records)

    def write_tile(self, first_row: int, first: int, encoder: RecordEncoder, tile: F32) -> None:
        """Write the columns from `first`, f32 [n, v], of rows that `encoder` has measured."""
        self._words_of_row[first_row : first_row + len(tile)] += tile.shape[1]
        for row, codes in enumerate(encoder.encode(tile).astype("<u2", copy=False), first_row):
            self._write(row, 4 + first, codes)

    def write_heads(self, first_row: int, encoder: RecordEncoder) -> None:
        """Write what is known once all tiles of these rows have been written."""
        heads = encoder.heads()
        self._words_of_row[first_row : first_row + len(heads)] += 4
        for row, words in enumerate(heads, first_row):
            self._write(row, 0, words)

    def commit(self) -> None:
        """Give the file its name. All columns and heads of all rows must have been written."""
        if (self._words_of_row != 4 + self.n_vocab).any():
            raise ValueError("rows are missing, or were written twice")
        with fs.writing(self.path):
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        fs.publish(self.path)

    def _write(self, row: int, word: int, words: NDArray[np.uint16]) -> None:
        offset = self._begin + 2 * (row * self._words + word)
        fs.write_at(self._fd, words.tobytes(), offset, self.path)


class BaseFile:
    """An open base file: tokens i32 [n_chunks, n_ctx], and rows of log-probabilities on demand.

    The file is mapped, not read. Anything that is not exactly such a file is a `SourceError`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.where = escaped(str(path))
        try:
            stat = self.path.stat()
            if not S_ISREG(stat.st_mode):
                raise self._error("not a regular file")
            with self.path.open("rb") as file:
                sizes = self._sizes(file.read(_HEAD.size), stat.st_size)
            self.n_ctx, self.n_vocab, self.n_chunks = sizes
            self.rows_per_chunk = len(scored_positions(self.n_ctx))
            self.n_rows = self.n_chunks * self.rows_per_chunk
            self.tokens: NDArray[np.int32] = np.memmap(
                self.path, "<i4", "r", _HEAD.size, (self.n_chunks, self.n_ctx)
            )
            begin = _HEAD.size + self.tokens.nbytes
            shape = (self.n_rows, _record_words(self.n_vocab))
            self._records = np.memmap(self.path, "<u2", "r", begin, shape)
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}") from error
        except ValueError as error:  # what memmap says of a file that is too short
            raise self._error("changed while it was opened") from error
        if self.tokens.min() < 0 or self.tokens.max() >= self.n_vocab:
            raise self._error(f"tokens outside the vocabulary of {self.n_vocab}")

    def _sizes(self, head: bytes, n_bytes: int) -> tuple[int, int, int]:
        """n_ctx, n_vocab and n_chunks, as far as the file's size bears them out."""
        if len(head) < _HEAD.size or not head.startswith(MAGIC):
            raise self._error(
                "not a file of base log-probabilities",
                hint="make one with llama-perplexity --kl-divergence-base FILE -f TEXT",
            )
        _, n_ctx, n_vocab, n_chunks = _HEAD.unpack(head)
        if not (3 <= n_ctx <= MAX_N_CTX and 1 <= n_vocab <= MAX_N_VOCAB and n_chunks >= 1):
            raise self._error(f"{n_chunks} chunks of {n_ctx} tokens, vocabulary of {n_vocab}")
        n_rows = n_chunks * len(scored_positions(n_ctx))
        expected = _HEAD.size + 4 * n_chunks * n_ctx + 2 * n_rows * _record_words(n_vocab)
        if n_bytes != expected:
            raise self._error(
                f"{n_bytes} bytes, expected {expected} for {n_chunks} chunks of {n_ctx} tokens",
                hint="the run that wrote it did not finish: write it again"
                if n_bytes < expected
                else "",
            )
        return n_ctx, n_vocab, n_chunks

    def chunk(self, number: int) -> F32:
        """Log-probabilities of a chunk's scored positions, f32 [rows_per_chunk, n_vocab]."""
        begin = number * self.rows_per_chunk
        return self.tile(begin, begin + self.rows_per_chunk, 0, self.n_vocab)

    def tile(self, row_begin: int, row_end: int, first: int, last: int) -> F32:
        """Log-probabilities of rows and columns, f32; not normalised, as llama.cpp takes them."""
        records = self._records[row_begin:row_end]
        scale, least = records[:, :4].copy().view("<f4").T
        with np.errstate(over="ignore"):
            highest = scale * _TOP + least
        wrong = ~(np.isfinite(highest) & (scale >= 0) & (highest <= _OVER))
        if wrong.any():
            row = row_begin + int(np.flatnonzero(wrong)[0])
            raise self._error(f"row {row} does not hold log-probabilities")
        codes = records[:, 4 + first : 4 + last]
        rows: F32 = scale[:, None] * codes.astype(np.float32) + least[:, None]
        return rows

    def _error(self, message: str, hint: str = "") -> SourceError:
        return SourceError(message, where=self.where, hint=hint)
