"""A small byte-level BPE tokenizer.json in the style of a model family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _common import write_json
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_TEXT = """\
A kettle stood on the stove and the wind came in under the door. She counted the steps from the
window to the table: 1, 2, 3, and then 14 more, until the lamp was out of reach. "It isn't far,"
he said, "and we've walked further for less." They would've left at 7:45, but the train was late
again; the notice said 8:05, then 8:30, then nothing at all. In the morning the harbour was grey.
Nobody remembered who had drawn the map or why the river ran north on it. The mill had 12 rooms,
250 sacks of flour, and one cat. A letter from 1987 lay in the drawer under the other letters.
def mean(values):
    total = 0.0
    for value in values:
        total += value  # sum first, divide once
    return total / max(1, len(values))
class Table:
    def __init__(self, rows, columns):
        self.rows = rows
        self.columns = columns
Der Weg führte über die Brücke; après la pluie, l'été était déjà là.
Москва и река. 北京の朝、静かな海。
The compiler warned about the unused result, the missing return and the shadowed name. When the
water is warm, stir in the salt, wait ten minutes, and pour it slowly over the leaves.
Prices rose by 3.5% in March and 12.25% in April; the report (see page 1024) explains neither.
"""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Per style: what splits text before merging, and the special tokens, BOS and EOS first.
_STYLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama3": (
        (_LLAMA3,),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|pad|>"),
    ),
    "deepseek3": (
        _DEEPSEEK_V3,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>"),
    ),
}

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tokenizer(out: Path, style: str, vocab_size: int) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json; returns the BOS and EOS ids.

    `style` is llama3 or deepseek3. The last ids of the `vocab_size` are the special tokens.
    """
    patterns, specials = _STYLES[style]
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    splits: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens(list(specials))
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    bos, eos = specials[:2]
    first = vocab_size - len(specials)
    ids = {"bos": first, "eos": first + 1}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids["bos"])]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(first + i): {"content": name, **flags, "special": True}
            for i, name in enumerate(specials)
        },
        "bos_token": bos,
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)
    return ids
