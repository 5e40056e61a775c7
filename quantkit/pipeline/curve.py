"""The picture of an allocation: what every size costs at least, and where recipes lie."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import UsageError
from quantkit.evaluate.charts import Point, scatter
from quantkit.evaluate.style import CSS
from quantkit.evaluate.svg import clean, standalone
from quantkit.pipeline.allocation import Answer
from quantkit.pipeline.guide import LADDER
from quantkit.run import fs
from quantkit.run.events import size, unit_of


def draw(answer: Answer, model: str, path: Path) -> None:
    """Write the picture: a page, or the picture alone by the name's ending."""
    picture = _picture(answer)
    if path.suffix == ".svg":
        text = standalone(picture, CSS)
    elif path.suffix == ".html":
        text = _page(picture, clean(model))
    else:
        raise UsageError("a picture's name ends in .html or .svg", where=str(path))
    fs.make_folder(path.parent)
    fs.write_whole(path, text.encode())


def _picture(answer: Answer) -> str:
    least = min([answer.n_bytes, *(mark.n_bytes for mark in answer.marks)])
    unit, scale = unit_of(least)

    def point(n_bytes: int, kld: float, name: str, colour: int) -> Point:
        hover = f"{name}\n{size(n_bytes)}, predicted KLD {kld:.4g}" if name else ""
        return Point(n_bytes / scale, kld, name, hover, colour)

    marks = [
        point(mark.n_bytes, mark.kld, mark.name, 1 if mark.name.startswith(LADDER) else 0)
        for mark in answer.marks
        if mark.kld > 0
    ]
    chosen = point(answer.n_bytes, answer.kld, "this recipe", 2)
    most = max(p.x for p in [chosen, *marks])
    front = [point(n, kld, "", 2) for n, kld in answer.front if kld > 0 and n / scale <= most]
    return scatter([chosen, *marks], front, f"size of the files, {unit}", "predicted KLD, nats")


def _page(picture: str, model: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{model}</title>'
        f"<style>{CSS}</style></head>\n<body><header><h1>{model}</h1>"
        "<p>KL divergence to expect of recipes, by the size of their files</p></header>\n"
        f'<figure><div class="wide">{picture}</div><figcaption>The stairs are the least that any '
        "choice of types costs at a size, as predicted from what was measured of this model. All "
        "dots are predictions for the rounding that was measured.</figcaption></figure>"
        "\n</body></html>\n"
    )
