"""A small made-up installation of Python modules, for what searches code."""

from pathlib import Path

import pytest

VERBS = ("parse", "format", "remove", "count", "merge", "sort", "encode", "rotate")
NOUNS = ("date", "header", "matrix", "polygon", "socket", "token", "ledger", "orbit")

FUNCTION = '''
def {verb}_{noun}({noun}, limit):
    """{Verb} the {noun} until the {noun} limit is met.

    More about it.
    """
    for {verb}_index in range(limit):
        {noun} = {verb}_{noun}_once({noun}, {verb}_index)
    return {noun}


def undocumented_{verb}_{noun}({noun}):
    return {noun}.{verb}(strict=True)
'''


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("installation")
    for noun in NOUNS:
        for verb in VERBS:
            module = root / noun / f"{verb}.py"
            module.parent.mkdir(exist_ok=True)
            module.write_text(FUNCTION.format(verb=verb, Verb=verb.title(), noun=noun))
    return root
