"""Text to token ids: the words inside identifiers and prose, hashed.

``parse_isoDate`` and "Parse an ISO date" share all their words; the five-character prefix of a long word lets *parser*,
*parsed* and *parse* meet too. Hashing needs no vocabulary, so ids mean the same in every run and for every corpus.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache

__all__ = ["PADDING", "VOCABULARY_SIZE", "token_ids", "words"]

VOCABULARY_SIZE = 2**16
PADDING = 0
"""The id that no word has; it fills up short rows."""

_PREFIX_LENGTH = 5
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


def words(text: str) -> list[str]:
    """Splits snake_case, camelCase and prose into lower-case words, long ones followed by their prefix.

    >>> words("parse_isoDateTime")
    ['parse', 'iso', 'date', 'time']
    >>> words("HTTPServer")
    ['http', 'server', 'serve']
    """
    found: list[str] = []
    for match in _WORD.findall(text):
        word = match.lower()
        found.append(word)
        if len(word) > _PREFIX_LENGTH:
            found.append(word[:_PREFIX_LENGTH])
    return found


@lru_cache(maxsize=2**18)
def token_ids(text: str) -> tuple[int, ...]:
    """Hashed ids of ``words(text)``, each in ``1 .. VOCABULARY_SIZE - 1``; the same in every process."""
    return tuple(zlib.crc32(word.encode()) % (VOCABULARY_SIZE - 1) + 1 for word in words(text))
