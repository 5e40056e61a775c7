"""Texts by domain hold the shipped corpus's documents, and their halves share none."""

from __future__ import annotations

import pytest

from benchmarks.texts import DOMAINS, texts, write
from quantkit.text.corpus import load_corpus
from quantkit.text.documents import documents


def read(path):
    return [document.text for document in documents(load_corpus(str(path)), None)]


def test_every_document_of_the_shipped_corpus_is_in_one_domain():
    whole = [document.text.strip("\n") for document in documents(load_corpus("core"), None)]
    made = [text.strip("\n") for found in texts(load_corpus("core")).values() for text in found]
    assert sorted(made) == sorted(whole)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_halves_are_the_whole_and_share_no_document(tmp_path, domain):
    whole, *halves = map(read, write(tmp_path, domain, texts(load_corpus("core"))[domain]))
    assert sorted(whole) == sorted(halves[0] + halves[1])
    assert not set(halves[0]) & set(halves[1])


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_half_has_a_good_part_of_the_text(tmp_path, domain):
    sizes = [
        path.stat().st_size for path in write(tmp_path, domain, texts(load_corpus("core"))[domain])
    ]
    assert min(sizes[1:]) > 0.4 * sizes[0]


def test_a_corpus_with_a_file_of_no_domain_is_refused(tmp_path):
    (tmp_path / "stray.txt").write_text("text")
    with pytest.raises(SystemExit, match=r"stray\.txt"):
        texts(load_corpus(str(tmp_path / "stray.txt")))
