"""The card's front matter, and what it takes over from the card of the base model.

A base model's card is a stranger's file: only words of known keys, of known form, are taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from quantkit.errors import UsageError
from quantkit.publish.card import Card
from quantkit.run.settings import parse_settings

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

MAX_CARD_BYTES = 1 << 20
# Three hyphens, YAML, three hyphens: as the Hub finds it.
FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,95}")
_URL = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~%+/@=?&-]*)?")
_PATH = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|multilingual|code")
_MAX_LANGUAGES = 200


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a quant has from its base model; None where that does not say."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None

    def filled(self, other: Inherited) -> Inherited:
        """This, with the license or the languages of `other` where it has none."""
        found = self
        if found.license is None:
            found = replace(
                found,
                license=other.license,
                license_name=other.license_name,
                license_link=other.license_link,
            )
        return found if found.languages else replace(found, languages=other.languages)


class _Front(BaseModel):
    license: Any = None
    license_name: Any = None
    license_link: Any = None
    language: Any = None
    pipeline_tag: Any = None


def inherited(card: str, base: str) -> Inherited:
    """Read the front matter of base model `base`'s card.

    `UsageError` where it is too large or no plain YAML. A key whose value is not what the Hub
    expects of it is passed over.
    """
    where = f"README.md of {base}"
    if len(card) > MAX_CARD_BYTES:
        raise UsageError(f"larger than {MAX_CARD_BYTES} bytes", where=where)
    found = FRONT.match(card)
    if found is None:
        return Inherited()
    front = parse_settings(found[1], _Front, where=where, hint="")
    return checked(
        front.license,
        front.license_name,
        front.license_link,
        front.language,
        front.pipeline_tag,
        base=base,
    )


def checked(
    license: Any,
    license_name: Any,
    license_link: Any,
    languages: Any,
    pipeline_tag: Any = None,
    *,
    base: str | None,
) -> Inherited:
    """Values of any origin, as far as they are of the right form.

    A link that is a path is one into the repository of `base`.
    """
    listed = languages if isinstance(languages, list) else [languages]
    known = (word for word in listed[:_MAX_LANGUAGES] if _is(_LANGUAGE, word))
    link = license_link if _is(_URL, license_link) else None
    if link is None and base and _is(_PATH, license_link):
        link = f"https://huggingface.co/{base}/blob/main/{license_link}"
    return Inherited(
        license=license if _is(_WORD, license) else None,
        license_name=license_name if _is(_WORD, license_name) else None,
        license_link=link,
        languages=tuple(dict.fromkeys(known)),
        pipeline_tag=pipeline_tag if _is(_WORD, pipeline_tag) else None,
    )


def _is(form: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 300 and form.fullmatch(value) is not None


def front_matter(card: Card, base: Inherited, *, has_vision: bool, chats: bool) -> ModelCardData:
    """What the Hub's search and page go by. `chats` says that there is a chat template."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415 - a second that publishing alone takes

    tags = ["gguf", "llama.cpp", "quantkit"]
    tags += ["imatrix"] if any("imatrix" in extra.path for extra in card.extras) else []
    tags += ["conversational"] if chats else []
    task = base.pipeline_tag or ("image-text-to-text" if has_vision else "text-generation")
    if task == "image-text-to-text" and not has_vision:
        task = "text-generation"
    return ModelCardData(
        base_model=card.base,
        base_model_relation="quantized" if card.base else None,
        quantized_by=card.repo.partition("/")[0],
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        language=list(base.languages) or None,
        library_name="gguf",
        pipeline_tag=task,
        tags=tags,
    )
