"""Refusals in the shape of OpenAI's interface: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error",
}  # fmt: skip


class Refusal(Exception):
    """An answer with this status; `param` names the field that is wrong."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status)


def answer_in_openai_shape(app: FastAPI) -> None:
    """Whatever goes wrong in `app` is told in that shape, a body that is no JSON or lacks a field with status 400."""
    app.add_exception_handler(Refusal, _refusal)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _fault)


async def _refusal(request: Request, error: Any) -> JSONResponse:
    return error.response()


async def _not_valid(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}").response()
    names = first["loc"][1:]  # without "body"
    if first["type"] == "extra_forbidden":
        field = ".".join(map(str, names))
        return Refusal(400, f"{field or 'a key of no letters'} is unknown: leave it out", param=field).response()
    field = ".".join(str(name) for place, name in enumerate(names) if place == 0 or not _is_kind(name))
    kind = request.headers.get("content-type", "none")
    no_object = f"the body is no JSON object sent as Content-Type: application/json (it came as {kind})"
    return Refusal(400, f"{field or no_object}: {first['msg']}", param=field or None).response()


def _is_kind(name: str | int) -> bool:
    """Whether pydantic names one of the kinds that a field can be of, and not a field in it."""
    return isinstance(name, str) and (name in ("str", "int", "float", "bool") or "[" in name or "-" in name)


async def _http(request: Request, error: Any) -> JSONResponse:
    return Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()


async def _fault(request: Request, error: Exception) -> JSONResponse:
    """Of a fault of ours; its traceback is in the server's log."""
    return Refusal(500, f"the server failed: {type(error).__name__}").response()
