"""Writing, and what the system's refusals turn into."""

from __future__ import annotations

import os

import pytest

from quantkit.errors import OutputError
from quantkit.run import fs


def test_a_final_name_holds_all_of_a_small_file(tmp_path):
    fs.write_whole(tmp_path / "a.json", b"x" * 1000)
    assert (tmp_path / "a.json").read_bytes() == b"x" * 1000
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_an_output_error_with_a_remedy():
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(OutputError, match="no space left") as caught,
    ):
        fs.write_at(full.fileno(), b"x", 0, fs.Path("/dev/full"))
    assert "continues where it stopped" in caught.value.hint


def test_too_little_space_is_refused_before_the_start(tmp_path):
    with pytest.raises(OutputError, match="are needed and"):
        fs.require_space(tmp_path, 1 << 60, 0)


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        fs.make_folder(tmp_path / "file" / "folder")
