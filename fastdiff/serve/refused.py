"""The answer to a request that is not drawn: a status and a sentence, as in OpenAI's API."""

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's `type` of an error, by status, for those that `_kind` does not cover."""
CLOSES = (401, 408, 413, 415)
"""After these statuses the rest of a body may arrive unread, so the connection is closed."""


class Refused(Exception):
    """A request is not drawn.

    Attributes:
        status: the HTTP status.
        sentence: what was got, what was expected, what to do.
        code: OpenAI's `code`, a word for programs.
        retry_after: seconds after which to try again; None if that would change nothing.
    """

    def __init__(
        self, status: int, sentence: str, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(status, sentence, code, retry_after)  # all of them, or it would not pickle
        self.status, self.sentence, self.code = status, sentence, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error in the form of OpenAI's API."""
        kind = KINDS.get(self.status, _kind(self.status))
        error = {"message": self.sentence, "type": kind, "param": None, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """The HTTP headers of the answer."""
        told = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        told |= {"Connection": "close"} if self.status in CLOSES else {}
        return told | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def _kind(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def cancelled() -> Refused:
    """Says that a client with the right to do so has cancelled the request."""
    return Refused(410, "the request was cancelled", "cancelled")
