"""KL divergence of quantkit's files and of llama-quantize's, same types, same imatrix, same text.

    python benchmarks/kl.py MODEL --imatrix imatrix.gguf --text held-out.txt --presets q2_k,iq2_xxs

MODEL is a checkpoint's folder. Every preset is made twice: by `quantkit convert` and, from an F32
GGUF, by llama.cpp's own quantiser (llama-cpp-python). All files are scored in one sweep against the
checkpoint; the table shows both sides and the ratio of mean KLDs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llama_quantize import quantize

from quantkit.container.shardset import open_shards
from quantkit.errors import UsageError
from quantkit.pipeline import Job, Output, convert
from quantkit.pipeline.evaluation import Evaluation, evaluate
from quantkit.pipeline.opening import Reading, Running
from quantkit.run.events import Silent


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    pairs = [_pair(args, preset) for preset in args.presets.split(",")]
    job = Evaluation(
        args.model,
        tuple(path for pair in pairs for path in pair),
        Reading(args.text, args.budget),
        Running(),
        force=True,
    )
    report = evaluate(job, args.work / "state", Silent())
    if args.json:
        args.json.write_text(json.dumps(report))
    quants = report["quants"]
    print(f"{report['text']['n_chunks']} chunks of {report['text']['n_ctx']}, base PPL", end=" ")
    print(f"{report['base']['ppl']:.4f}\n")
    print("| preset | bytes | llama.cpp KLD | quantkit KLD | ratio | PPL | top p |")
    print("|---|---|---|---|---|---|---|")
    for theirs, ours, preset in zip(
        quants[::2], quants[1::2], args.presets.split(","), strict=True
    ):
        print(_row(preset, theirs, ours))


def _row(preset: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    cells = (
        preset.upper(),
        f"{theirs['bytes']:,} / {ours['bytes']:,}",
        f"{theirs['kld_mean']:.5f} ± {theirs['kld_mean_error']:.5f}",
        f"{ours['kld_mean']:.5f} ± {ours['kld_mean_error']:.5f}",
        f"{ours['kld_mean'] / theirs['kld_mean']:.3f}",
        f"{theirs['ppl']:.3f} / {ours['ppl']:.3f}",
        f"{theirs['same_top_p']:.2f} / {ours['same_top_p']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _pair(args: argparse.Namespace, preset: str) -> tuple[Path, Path]:
    """llama.cpp's file and ours, of the same types tensor by tensor."""
    theirs = args.work / f"llamacpp-{preset}.gguf"
    if not theirs.exists():
        quantize(
            _converted(args, "f32", None), theirs, preset, args.imatrix, n_threads=args.threads
        )
    ours = _converted(args, preset, args.imatrix)
    types = [{t.name: t.type for _, t in open_shards(path).tensors()} for path in (theirs, ours)]
    if types[0] != types[1]:
        raise UsageError(f"{preset}: the two files do not have the same types")
    return theirs, ours


def _converted(args: argparse.Namespace, recipe: str, imatrix: Path | None) -> Path:
    job = Job(args.model, recipe, name="quantkit", mmproj=None, imatrix=imatrix, corpus=None)
    done = convert(job, Output(args.work, args.threads, force=True), Silent())
    return Path(args.work / done.plans[-1].shards[0].file)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--presets", default="q2_k,iq2_xxs,iq1_m")
    parser.add_argument("--budget", type=int, help="tokens of the text")
    parser.add_argument("--work", type=Path, default=Path("kl-work"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
