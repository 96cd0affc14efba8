"""S3: one GET of an object, from any byte on, by s3fs.

A body is one request, however large it is. Neither the driver nor its client tries anything again: the retries of the
two would multiply with those of the caller, and none of them goes on where a body broke off.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from modelserve import plugins
from modelserve.errors import BackendUnavailable, ModelServeError
from modelserve.ports import Interrupted, ObjectChanged, OpenObject

_BACKEND: Final = "artifact store"
_CONFIG: Final = {
    "retries": {"total_max_attempts": 1},
    "response_checksum_validation": "when_required",  # not of a part, and weaker than the digest that decides anyway
}
_PIECE: Final = 1024 * 1024
_PIECE_S: Final = 1.0  # a slow body is handed on in smaller pieces, so that the caller can look at the clock
_PASSING_CODES: Final = {"RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "ThrottlingException"}
_DENIED_CODES: Final = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"}
_CODE: Final = re.compile(r"[A-Za-z0-9]{1,64}")
_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+)")
_CHANGED: Final = (412, 416)  # another tag; or so much shorter that there is no such byte


class S3Reader:
    """Reads objects with the options of an ``s3fs.S3FileSystem``.

    A connection on which nothing arrives for ``config_kwargs["read_timeout"]`` seconds (15 unless set) is given up.
    """

    def __init__(self, storage_options: Mapping[str, Any]) -> None:
        s3fs = plugins.require("s3fs")
        config = {**storage_options.get("config_kwargs", {}), **_CONFIG}
        self._fs = s3fs.S3FileSystem(**{**storage_options, "config_kwargs": config, "skip_instance_cache": True})
        self._fs.retries = 1

    @contextlib.contextmanager
    def open(self, path: str, start: int, tag: str | None) -> Iterator[OpenObject]:
        """Ask for the object once."""
        bucket, key, _ = self._fs.split_path(path)
        condition = {} if tag is None else {"IfMatch": tag}
        begin = {"Range": f"bytes={start}-"} if start else {}
        with _classified(key, bucket):
            answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key, **begin, **condition)
        body = answer["Body"]
        try:
            found, size = _extent(answer)
            pieces = _without(start - found, self._pieces(body, key, bucket))
            yield OpenObject(answer.get("ETag"), size, pieces)
        finally:
            self._fs.loop.call_soon_threadsafe(body.close)  # half a body ends its connection, a whole one keeps it

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        client = self._fs._s3  # noqa: SLF001  # asking politely, by the property, would connect
        if client is not None:
            self._fs.close_session(self._fs.loop, client)
            self._fs._s3 = None  # noqa: SLF001

    def _pieces(self, body: Any, key: str, bucket: str) -> Iterator[bytes]:
        while True:
            piece, error = asyncio.run_coroutine_threadsafe(_piece_of(body), self._fs.loop).result()
            if piece:
                yield piece
            if error is not None:
                with _classified(key, bucket):
                    raise error
            if not piece:
                return


async def _piece_of(body: Any) -> tuple[bytes, Exception | None]:
    """Collect what arrives into a piece that is worth the way between threads; keep it when an error follows."""
    piece = bytearray()
    loop = asyncio.get_running_loop()
    end = loop.time() + _PIECE_S
    try:
        while len(piece) < _PIECE and loop.time() < end:
            arrived = await body.read(_PIECE - len(piece))
            if not arrived:
                break
            piece += arrived
    except Exception as error:  # noqa: BLE001  # handed over with the bytes before it
        return bytes(piece), error
    return bytes(piece), None


def _extent(answer: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return the first byte of an answer, which is 0 where a server knows no ranges, and the size of the whole."""
    span = _RANGE.fullmatch(answer.get("ContentRange") or "")
    return (int(span[1]), int(span[2])) if span else (0, answer.get("ContentLength"))


def _without(count: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Leave out the first bytes: those that are there already."""
    for piece in pieces:
        if count < len(piece):
            yield piece[count:]
        count = max(0, count - len(piece))


# -- telling failures apart --------------------------------------------------------------------------------


@contextlib.contextmanager
def _classified(key: str, bucket: str) -> Iterator[None]:
    """Turn what the driver raises into what the port says. Its text may hold hosts and keys; it stays in the cause."""
    try:
        yield
    except (ModelServeError, Interrupted, ObjectChanged):
        raise
    except Exception as error:
        refused = _refusal(error)
        if refused is not None:
            raise _answered(refused, key, bucket) from error
        if isinstance(error, _passing()):
            raise Interrupted(_in_a_word(error)) from error
        raise BackendUnavailable(_BACKEND, f"{type(error).__name__} on {key}") from error


def _refusal(error: BaseException) -> Any:
    """Return the server's answer in an error; None when there was none. The driver hides it in the cause."""
    client_error = plugins.require("botocore.exceptions").ClientError
    return next((each.response for each in (error, error.__cause__) if isinstance(each, client_error)), None)


def _answered(refused: Mapping[str, Any], key: str, bucket: str) -> Exception:
    status = refused.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(refused.get("Error", {}).get("Code", ""))
    named = f"{status} {code}" if _CODE.fullmatch(code) and code != str(status) else str(status)
    if status >= 500 or status in {408, 429} or code in _PASSING_CODES:  # noqa: PLR2004
        return Interrupted(named)
    if status in _CHANGED:
        return ObjectChanged(named)
    if code == "NoSuchBucket":
        return BackendUnavailable(_BACKEND, f"there is no bucket {bucket!r} (404 NoSuchBucket)")
    if status == 404:  # noqa: PLR2004
        return FileNotFoundError(named)
    if status in {401, 403} or code in _DENIED_CODES:
        return BackendUnavailable(_BACKEND, f"access to {key} is denied ({named}); it takes the right s3:GetObject")
    return BackendUnavailable(_BACKEND, f"{named} on {key}")


def _passing() -> tuple[type[BaseException], ...]:
    """Return what a connection raises when it fails; a wrong option or missing credentials are not among it."""
    botocore = plugins.require("botocore.exceptions")
    parsers = plugins.require("botocore.parsers")
    aiohttp = plugins.require("aiohttp")
    return (
        botocore.HTTPClientError,
        botocore.IncompleteReadError,
        botocore.CredentialRetrievalError,
        parsers.ResponseParserError,
        aiohttp.ClientError,
        OSError,
    )


def _in_a_word(error: BaseException) -> str:
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "nothing arrived in time"
    return f"the connection broke ({type(error).__name__})"
