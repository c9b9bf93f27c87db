"""Fills sequences with documents. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def pack(documents: Iterable[Sequence[int]], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut documents into sequences of `length` tokens, one document after the other; no token is dropped.

    Args:
        documents: token ids of each document, with its end token.
        length: tokens of a sequence; the last one may be shorter.

    Yields:
        Token ids, and the position of each within its piece of a document: a 0 begins a piece. A document that does
        not fit goes on in the next sequence as a piece of its own, because it sees nothing of the one before.
    """
    ids: list[int] = []
    positions: list[int] = []
    for document in documents:
        start = 0
        while start < len(document):
            piece = document[start : start + length - len(ids)]
            ids += piece
            positions += range(len(piece))
            start += len(piece)
            if len(ids) == length:
                yield ids, positions
                ids, positions = [], []
    if ids:
        yield ids, positions


def pieces(document: Sequence[int], length: int) -> Iterator[list[int]]:
    """Cut one document into pieces of at most `length` tokens."""
    for start in range(0, len(document), length):
        yield list(document[start : start + length])
