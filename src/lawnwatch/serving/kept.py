"""What the store keeps, as an answer."""

from __future__ import annotations

from collections.abc import Generator
from itertools import chain

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lawnwatch import log
from lawnwatch.errors import LawnwatchError, NotFound
from lawnwatch.store import ObjectStore

logger = log.get(__name__)

PIECE = 1 << 16


class Kept(StreamingResponse):
    """An object of the store, piece by piece: who reads slowly keeps some of them in memory, and no thread.

    To be made in a thread, for it asks the store.

    Raises:
        NotFound: the store has no such object.
        Unavailable: the store does not answer.
    """

    def __init__(self, store: ObjectStore, key: str, media_type: str) -> None:
        found = store.stat(key)
        if found is None:
            raise NotFound(f"The store has no object {key}.")
        self._key = key
        self._pieces = _pieces(store, key)
        first = next(self._pieces, b"")  # what cannot be read is said while there can be another answer
        super().__init__(
            chain([first], self._pieces), headers={"Content-Length": str(found.size)}, media_type=media_type
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except LawnwatchError as error:  # the answer has begun: it ends too soon, and its connection with it
            logger.error("an object of the store broke off", key=self._key, error=error.message)
        finally:
            self._pieces.close()


def _pieces(store: ObjectStore, key: str) -> Generator[bytes, None, None]:
    with store.open(key) as stream:
        while piece := stream.read(PIECE):
            yield piece
