"""KL divergence of allocations, at the sizes of llama-quantize's presets.

    PYTHONPATH=.:scripts python benchmarks/allocation.py MODEL --imatrix imatrix.gguf \\
        --texts prose.txt,code.txt --presets iq2_xxs,q2_k --calibration calibration.txt \\
        --calibration-tokens 65536 [--by measured,plain]

MODEL is a checkpoint's folder. Every preset is made by llama.cpp's own quantiser with the imatrix.
Files of at most that size are made by `quantkit allocate` and `quantkit convert`: `measured` is
what users get; `plain` chooses types by the importance-weighted square error of weights, as
llama.cpp's PR 15550 does, and is rounded in the same way, so that the two differ in the choice of
types alone. For each text, all files are scored in one sweep against the checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from llama_quantize import quantize

from benchmarks.kl import converted_to, names, reference_of
from quantkit.allocate.as_recipe import as_yaml
from quantkit.allocate.budget import Files
from quantkit.allocate.budget import allocate as allocate_within
from quantkit.allocate.choices import build_groups
from quantkit.pipeline import Job, Output
from quantkit.pipeline.allocation import Goal, Question, allocate
from quantkit.pipeline.evaluation import Evaluation, evaluate
from quantkit.pipeline.importance import load_importance
from quantkit.pipeline.opening import Reading, Running
from quantkit.pipeline.planning import planned
from quantkit.plan.build import MAX_SHARD_BYTES
from quantkit.quantize.codec import How, codec_of
from quantkit.quantize.gain import encode_rows
from quantkit.recipe import Recipe, load_recipe
from quantkit.run.events import Silent
from quantkit.source.slabs import read_rows
from quantkit.types import GgmlType, TensorSpec

_RECORDS = 1024  # bytes of keys that a conversion adds
_ROWS = 128  # of each expert or head, by which errors of weights are judged


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    made = [row for preset in args.presets for row in _files(args, preset)]
    reports = {}
    for text in args.texts:
        files = tuple(path for _, _, path, _ in made)
        job = Evaluation(args.model, files, Reading(text, args.budget), Running(), force=True)
        reports[text] = evaluate(job, args.work / "state", Silent())
        _print(text, reports[text], made)
        if args.json:
            args.json.write_text(json.dumps(reports))


Made = tuple[str, str, Path, float | None]  # preset, who, the file, predicted KLD


def _files(args: argparse.Namespace, preset: str) -> list[Made]:
    theirs = args.work / f"llamacpp-{preset}.gguf"
    if not theirs.exists():
        name = load_recipe(preset).file_type
        assert name is not None
        quantize(reference_of(args), theirs, name, args.imatrix, n_threads=args.threads)
    n_bytes = theirs.stat().st_size
    made: list[Made] = [(preset, "llama.cpp", theirs, None)]
    for way in args.by:
        recipe = args.work / f"{way}-{preset}.yaml"
        kld = {"measured": _measured, "plain": _plain}[way](args, n_bytes, recipe)
        path = _converted(args, recipe)
        if path.stat().st_size > n_bytes:
            raise SystemExit(f"{path} is larger than {theirs}")
        made.append((preset, way, path, kld))
    return made


def _measured(args: argparse.Namespace, n_bytes: int, recipe: Path) -> float:
    reading = Reading(args.calibration, args.allocation_tokens)
    question = Question(args.model, reading, Running(), n_threads=args.threads)
    return allocate(question, Goal(str(n_bytes)), recipe, Silent()).kld


def _plain(args: argparse.Namespace, n_bytes: int, recipe: Path) -> None:
    like = Job(args.model, "q8_0", mmproj=None, corpus=None)
    with planned(like, Silent()) as (checkpoint, decided):
        plan = decided.plans[-1]
        specs = tuple(sorted((t.spec for t in plan.tensors), key=lambda spec: spec.name))
        lookup = load_importance(args.imatrix, specs).lookup

        def cost(spec: TensorSpec, type_: GgmlType) -> float:
            n_rows = spec.shape[-2]
            n_matrices = spec.grid[0] // n_rows
            step = max(1, n_rows // _ROWS)
            total = 0.0
            known = lookup.get(spec.name)
            for m in range(n_matrices):
                x = read_rows(checkpoint, spec, m * n_rows, (m + 1) * n_rows)[::step]
                x = np.ascontiguousarray(x, np.float32)
                weight = None if known is None else known[m % len(known)]
                codec = codec_of(type_)
                back = codec.decode(encode_rows(codec, x, weight, How("fast", "importance", 0.0)))
                square = np.square(back - x, dtype=np.float64)
                total += float((square if weight is None else square * weight).sum()) * step
            return total

        groups = build_groups(specs, cost, Question(args.model, Reading(""), Running()).legal)
    found = allocate_within(groups, Files(specs, plan.kvs, MAX_SHARD_BYTES), n_bytes - _RECORDS)
    like = Recipe(name=recipe.stem, default=GgmlType.Q8_0, rounding="feedback")
    recipe.write_text(as_yaml(specs, found.types(), recipe.stem, like=like))


def _converted(args: argparse.Namespace, recipe: Path) -> Path:
    job = Job(
        args.model,
        str(recipe),
        name="quantkit",
        mmproj=None,
        corpus=args.calibration,
        budget=args.calibration_tokens,
    )
    return converted_to(args, job, Output(args.work, args.threads))


def _print(text: str, report: dict[str, Any], made: list[Made]) -> None:
    about = report["text"]
    print(f"\n{text}: {about['n_chunks']} chunks of {about['n_ctx']}\n")
    print("| size of | by | bytes | mean KLD | to llama.cpp | predicted | PPL | same top % |")
    print("|---|---|---|---|---|---|---|---|")
    reference: dict[str, Any] = {}
    for (preset, way, _, predicted), quant in zip(made, report["quants"], strict=True):
        if way == "llama.cpp":
            reference = quant
        cells = (
            preset.upper(),
            way,
            f"{quant['bytes']:,}",
            f"{quant['kld_mean']:.5f} ± {quant['kld_mean_error']:.5f}",
            f"{quant['kld_mean'] / reference['kld_mean']:.3f}",
            f"{predicted:.5f}" if predicted else "",
            f"{quant['ppl']:.3f}",
            f"{quant['same_top_p']:.2f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--texts", type=names, required=True, metavar="FILE,...")
    parser.add_argument("--presets", type=names, default="q2_k,iq2_xxs,iq1_m", metavar="NAME,...")
    parser.add_argument("--by", type=names, default="measured", metavar="measured,plain")
    parser.add_argument("--calibration", default="core", help="what feedback is run on")
    parser.add_argument("--calibration-tokens", type=int)
    parser.add_argument("--allocation-tokens", type=int, default=16_384)
    parser.add_argument("--budget", type=int, help="tokens of each text")
    parser.add_argument("--work", type=Path, default=Path("allocation-work"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
