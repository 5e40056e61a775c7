"""Ask: the same multiple-choice questions to a model and its quants, graded side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.evaluate.answers import answer
from quantkit.evaluate.choice import encode, grade
from quantkit.evaluate.compare import Party
from quantkit.evaluate.questions import SHOTS, load_task, sample
from quantkit.evaluate.report import TaskResult
from quantkit.forward.sweep import Settings
from quantkit.pipeline.calibration import progress_of
from quantkit.pipeline.opening import Opened
from quantkit.run.events import Reporter, files


@dataclass(frozen=True)
class Asking:
    """Which questions: `mmlu` or a JSONL file, after how many solved examples.

    `limit` is the most questions to ask, taken evenly. `examples` is a JSONL file that goes before
    the examples that a task brings itself.
    """

    task: str
    shots: int = SHOTS
    limit: int | None = None
    examples: Path | None = None


def ask(
    asking: Asking, base: Opened, quants: Sequence[Opened], settings: Settings, reporter: Reporter
) -> list[TaskResult]:
    """What each quant answers, beside what the base does; all of them run in one sweep.

    A killed run is continued from `settings.work`, where the caller clears the state.
    """
    if base.tokenizer is None:
        raise UsageError(
            "a GGUF file is run here without its tokenizer",
            where=base.name,
            hint="name the checkpoint's folder as the model that the quants are compared with",
        )
    task = load_task(asking.task, examples=asking.examples)
    if asking.limit is not None:
        task = sample(task, asking.limit)
    context = base.weights.kvs.get(f"{base.hyper.arch}.context_length")
    asked = encode(
        base.tokenizer, task, asking.shots, n_ctx=int(context.value) if context else None
    )
    reporter.stage(
        "task", f"{task.name}: {len(task.questions):,} questions, {asked.n_tokens:,} tokens"
    )
    models = (base, *quants)
    with progress_of(asked.n_tokens, f"ask {len(models)} models {task.name}", reporter) as progress:
        (reference, *answers), _ = answer(
            [Party(model.name, model.weights, model.hyper) for model in models],
            asked,
            settings,
            " ".join(model.identity for model in models),
            progress,
        )
    reporter.stage("ask", f"{files(len(quants))} against {base.name}")
    return [
        TaskResult(
            shots=asking.shots,
            digest=asked.digest,
            **grade(reference, theirs, task).as_json(),
        )
        for theirs in answers
    ]
