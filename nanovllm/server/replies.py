"""Errors as OpenAI's clients read them, in one form wherever in the server they arise."""

import json
from typing import Any

from nanovllm.errors import EngineDeadError, FieldError, NanoVLLMError, QueueFullError

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    431: "HeadersTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


def error_body(message: str, type: str, param: str | None, code: int) -> dict[str, Any]:
    """What an error response holds, as JSON.

    Args:
        type: as clients tell errors apart; see `error_type`. param: field of the request at fault.
        code: the HTTP status.
    """
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_type(code: int) -> str:
    """The type of error that a status stands for."""
    return ERROR_TYPES.get(code, "BadRequestError" if code < 500 else "InternalServerError")


def error_json(message: str, code: int, param: str | None = None) -> bytes:
    """The encoded body of an error response of the status's own type."""
    return json.dumps(error_body(message, error_type(code), param, code)).encode()


def error_reply(error: NanoVLLMError) -> tuple[int, dict[str, Any]]:
    """The status and the body for an error that the engine raised on purpose."""
    param = error.field if isinstance(error, FieldError) else None
    if param is not None:
        code = 400
    elif isinstance(error, QueueFullError | EngineDeadError):
        code = 503
    else:
        code = 500
    return code, error_body(str(error), error_type(code), param, code)
