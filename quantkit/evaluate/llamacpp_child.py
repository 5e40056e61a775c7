"""The process in which a GGUF file is run: `python -m quantkit.evaluate.llamacpp_child FD`.

Requests come as JSON lines on standard input, the first of which opens the model. Answers go to
file descriptor FD: a u64 count of bytes, then the bytes. Standard error has llama.cpp's log and,
where the process gives up, the reason as its last line. Exit status `REFUSED`: llama.cpp would
not; `NOT_USABLE`: it cannot be used at all. Ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
from typing import Any, BinaryIO

import numpy as np

from quantkit.errors import UsageError
from quantkit.evaluate.libllama import Session, load

NOT_USABLE = 3
REFUSED = 4


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    def answer(data: Any) -> None:
        view = memoryview(data).cast("B")
        answers.write(len(view).to_bytes(8, "little"))
        answers.write(view)
        answers.flush()

    opening = json.loads(requests.readline())
    session = Session(load(), opening["gguf"], n_gpu_layers=opening["n_gpu_layers"])
    context = session.context(
        opening["n_ctx"], threads=opening["threads"], kv_f32=opening["kv_f32"]
    )
    answer(json.dumps({"n_vocab": session.n_vocab, "bos": session.bos}).encode())
    for line in requests:
        request = json.loads(line)
        if "text" in request:
            ids = session.tokenize(request["text"], add_special=True, parse_special=False)
            answer(np.array(ids, "<i4"))
        else:
            session.clear(context)
            answer(session.decode(context, request["ids"], first_row=request["first"]))


def _main() -> int:
    try:
        with open(int(sys.argv[1]), "wb") as answers:  # noqa: PTH123 (a descriptor has no path)
            _serve(sys.stdin.buffer, answers)
    except UsageError as error:
        print(json.dumps([error.message, error.hint]), file=sys.stderr)
        return NOT_USABLE
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
