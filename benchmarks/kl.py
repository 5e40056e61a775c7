"""KL divergence of quantkit's files and of llama-quantize's, same types, same imatrix, same text.

    PYTHONPATH=.:scripts python benchmarks/kl.py MODEL --imatrix imatrix.gguf \\
        --texts prose.txt,code.txt --presets q2_k,my.yaml --variants nearest,feedback \\
        --calibration calibration.txt --calibration-tokens 65536

MODEL is a checkpoint's folder. Every preset is made by llama.cpp's own quantiser (llama-cpp-python,
from an F32 GGUF) and by `quantkit convert`, once for each variant of its rounding. A preset is a
name that both know, or a recipe of one's own, whose types llama.cpp is then told one by one. For
each text, all files are scored in one sweep against the checkpoint; a table per text shows mean
KLDs and their ratio to llama.cpp's.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml
from llama_quantize import quantize

from quantkit.container.shardset import open_shards
from quantkit.errors import UsageError
from quantkit.pipeline import Job, Output, convert
from quantkit.pipeline.evaluation import Evaluation, evaluate
from quantkit.pipeline.opening import Reading, Running
from quantkit.recipe import load_recipe
from quantkit.run.events import Silent
from quantkit.types import GgmlType

_LLAMACPP = "llama.cpp"


# Ways of converting: what they set of a recipe.
VARIANTS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest"},
    "feedback": {"rounding": "feedback"},
    "no-retarget": {"rounding": "feedback", "feedback": {"retarget": False}},
    "one-pass": {"rounding": "feedback", "feedback": {"passes": 0}},
    "one-pass-no-retarget": {"rounding": "feedback", "feedback": {"retarget": False, "passes": 0}},
    "two-passes": {"rounding": "feedback", "feedback": {"passes": 2}},
}


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    made = [(preset, *row) for preset in args.presets for row in _files(args, preset)]
    reports = {}
    for text in args.texts:
        job = Evaluation(
            args.model,
            tuple(path for _, _, path in made),
            Reading(text, args.budget),
            Running(),
            force=True,
        )
        reports[text] = evaluate(job, args.work / "state", Silent())
        _print(text, reports[text], [(preset, maker) for preset, maker, _ in made])
        if args.json:  # after every text: a sweep may take hours
            args.json.write_text(json.dumps(reports))


def _print(text: str, report: dict[str, Any], made: list[tuple[str, str]]) -> None:
    about = report["text"]
    print(f"\n{text}: {about['n_chunks']} chunks of {about['n_ctx']}", end=", ")
    print(f"base PPL {report['base']['ppl']:.4f}\n")
    print("| preset | by | bytes | mean KLD | to llama.cpp | PPL | same top % |")
    print("|---|---|---|---|---|---|---|")
    reference: dict[str, Any] = {}
    for (preset, maker), quant in zip(made, report["quants"], strict=True):
        if maker == _LLAMACPP:
            reference = quant
        cells = (
            Path(preset).stem.upper(),
            maker,
            f"{quant['bytes']:,}",
            f"{quant['kld_mean']:.5f} ± {quant['kld_mean_error']:.5f}",
            f"{quant['kld_mean'] / reference['kld_mean']:.3f}",
            f"{quant['ppl']:.3f}",
            f"{quant['same_top_p']:.2f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _files(args: argparse.Namespace, preset: str) -> list[tuple[str, Path]]:
    """Who made it and the file: llama.cpp's, then a file of the same types for each variant."""
    ours = [(name, _converted(args, preset, name)) for name in args.variants]
    theirs = args.work / f"llamacpp-{Path(preset).stem}.gguf"
    types = _types(ours[0][1])
    if not theirs.exists():
        own = Path(preset).suffix in {".yaml", ".yml"}
        file_type = load_recipe(preset).file_type
        if file_type is None:
            raise UsageError("llama.cpp needs a file_type to start from", where=preset)
        quantize(
            reference_of(args),
            theirs,
            file_type,
            args.imatrix,
            n_threads=args.threads,
            tensor_types={f"^{re.escape(name)}$": to for name, to in types.items()} if own else {},
        )
    for maker, path in ((_LLAMACPP, theirs), *ours[1:]):
        if _types(path) != types:
            raise UsageError(f"{preset}: {maker}'s file and {ours[0][0]}'s differ in types")
    return [(_LLAMACPP, theirs), *ours]


def _types(path: Path) -> dict[str, GgmlType]:
    return {tensor.name: tensor.type for _, tensor in open_shards(path).tensors()}


def reference_of(args: argparse.Namespace) -> Path:
    """The F32 GGUF that llama.cpp quantises."""
    job = Job(args.model, "f32", name="reference", mmproj=None, corpus=None)
    return converted_to(args, job, Output(args.work, args.threads))


def _converted(args: argparse.Namespace, preset: str, name: str) -> Path:
    recipe = args.work / f"{name}-{Path(preset).stem}.yaml"
    settings = load_recipe(preset).model_dump(mode="json", exclude_none=True) | VARIANTS[name]
    recipe.write_text(yaml.safe_dump(settings))
    job = Job(
        args.model,
        str(recipe),
        name=f"quantkit-{name}",
        mmproj=None,
        imatrix=args.imatrix,
        corpus=args.calibration,
        budget=args.calibration_tokens,
    )
    return converted_to(args, job, Output(args.work, args.threads, force=True))


def converted_to(args: argparse.Namespace, job: Job, output: Output) -> Path:
    """The one file of a conversion into the working folder."""
    return Path(args.work / convert(job, output, Silent()).plans[-1].shards[0].file)


def names(text: str) -> list[str]:
    """The parts of a list with commas."""
    return text.split(",")


def _variants(text: str) -> list[str]:
    if unknown := set(names(text)) - VARIANTS.keys():
        raise argparse.ArgumentTypeError(
            f"no variant is called {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}"
        )
    return names(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--texts", type=names, required=True, metavar="FILE,...")
    parser.add_argument("--presets", type=names, default="q2_k,iq2_xxs,iq1_m", metavar="NAME,...")
    parser.add_argument("--variants", type=_variants, default="nearest", metavar="NAME,...")
    parser.add_argument("--calibration", default="core", help="what feedback is run on")
    parser.add_argument("--calibration-tokens", type=int)
    parser.add_argument("--budget", type=int, help="tokens of each text")
    parser.add_argument("--work", type=Path, default=Path("kl-work"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
