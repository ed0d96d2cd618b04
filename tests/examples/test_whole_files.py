"""Files and folders that are complete or absent."""

from pathlib import Path

import pytest

from examples.whole_files import written_whole


def write_file(file: Path, text: str, *, stopped: bool = False) -> None:
    with written_whole(file) as unfinished:
        unfinished.write_text(text)
        if stopped:
            raise KeyboardInterrupt


def write_folder(folder: Path, name: str, *, stopped: bool = False) -> None:
    with written_whole(folder) as unfinished:
        unfinished.mkdir()
        write_file(unfinished / name, "", stopped=stopped)


def test_a_file_replaces_the_old_one_only_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    with pytest.raises(KeyboardInterrupt):
        write_file(file, "on", stopped=True)
    assert not file.exists()
    write_file(file, "one")
    with pytest.raises(KeyboardInterrupt):
        write_file(file, "tw", stopped=True)
    assert file.read_text() == "one"
    write_file(file, "two")
    assert file.read_text() == "two"
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_begins_empty_after_an_interruption(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, "one", stopped=True)
    assert not folder.exists()
    write_folder(folder, "two")
    assert [file.name for file in folder.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [folder]
