"""OpenAI's HTTP interface to the native engine: models, chat and text completions, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from sparse_bitnet import __version__
from sparse_bitnet.corpus.tokenizer import load_tokenizer, prompt_tokens
from sparse_bitnet.engine.decoder import Decoder, Head
from sparse_bitnet.serving.answers import Answer, model_card, usage
from sparse_bitnet.serving.chat_template import chat_text, read_chat_template
from sparse_bitnet.serving.errors import Refusal, answer_in_openai_shape
from sparse_bitnet.serving.requests import DEFAULT_COMPLETION, Asked, ChatRequest, CompletionRequest
from sparse_bitnet.serving.text import TextStream
from sparse_bitnet.serving.worker import BusyError, Job, Worker

REMEMBERED = 8  # tokens of a prompt that decide how the text after it begins
CLIENT_CLOSED = 499
MOST_SEQUENCES = 16


@dataclass(frozen=True)
class Served:
    """A model as it is served: under a name, with at most `context` tokens of prompt and answer together."""

    name: str
    worker: Worker
    tokenizer: PreTrainedTokenizerFast
    chat_template: str | None
    context: int


def open_served(
    model: str, head: Head, most: int | None, max_model_len: int | None, chat_template: Path | None
) -> Served:
    """A packed directory, opened, with a worker for `most` sequences; ValueError for what cannot be.

    Where it is None they are MOST_SEQUENCES, or as many of the whole length as the machine's memory has room for.
    """
    decoder = Decoder(model, head=head)
    context = decoder.architecture.context
    if max_model_len is not None and max_model_len > context:
        raise ValueError(f"--max-model-len {max_model_len} is beyond the model's context of {context}")
    tokenizer = load_tokenizer(model)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{model} has no tokenizer.json, by whose rules text is streamed")
    template = None if chat_template is None else read_chat_template(chat_template)
    length = max_model_len or context
    return Served(model, Worker(decoder, _sequences(decoder, most, length)), tokenizer, template, length)


def _sequences(decoder: Decoder, most: int | None, length: int) -> int:
    """So many at once, of `length` tokens each; ValueError where they can take more than all memory of the machine.

    Pages that were never written take none, so that one would learn of it in the middle of answers.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    each = decoder.cache_bytes(length)
    least = most or 1
    if least * each > memory:
        lower = "--max-sequences or --max-model-len" if least > 1 else "--max-model-len"
        raise ValueError(
            f"{least} sequence{'s' if least > 1 else ''} of {length} tokens can take {least * each / 1e9:.1f} GB "
            f"of {memory / 1e9:.1f}: lower {lower}"
        )
    return most or min(MOST_SEQUENCES, memory // each)


class Reply:
    """One answer on its way: pieces of its text, then how many tokens they were and why it ended."""

    def __init__(self, served: Served, job: Job, stop: list[str], before: list[int]) -> None:
        self.job, self.written, self.reason = job, 0, "length"
        self._ends = served.worker.decoder.end_tokens
        self._text = TextStream(served.tokenizer.backend_tokenizer, stop, before)

    async def pieces(self) -> AsyncGenerator[str]:
        async with aclosing(self.job.tokens()) as tokens:
            async for token in tokens:
                self.written += 1
                piece = "" if token in self._ends else self._text.put(token)
                if piece:
                    yield piece
                if token in self._ends or self._text.is_stopped:
                    self.reason = "stop"
                    break
        if rest := self._text.end():
            yield rest

    @property
    def usage(self) -> dict[str, int]:
        return usage(len(self.job.prompt), self.written)


class EventStream(StreamingResponse):
    """Server-sent events that let go of their sequence however they end."""

    def __init__(self, events: AsyncIterator[str], job: Job) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.drop()


def create_app(served: Served) -> FastAPI:
    """The app; the worker ends with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.worker.end)

    app = FastAPI(title="sparse-bitnet", version=__version__, lifespan=lifespan)
    answer_in_openai_shape(app)
    created, tokenizing = int(time.time()), Lock()

    def tokens_of(asked: ChatRequest | CompletionRequest) -> list[int]:
        """Takes long for a long text: not for the thread of the streams."""
        is_chat = isinstance(asked, ChatRequest)
        text = "" if is_chat else asked.prompt
        if not isinstance(text, str):  # they are tokens
            return text
        param = "messages" if is_chat else "prompt"
        with tokenizing:  # a tokenizer is not for two threads at a time
            if is_chat:
                text = chat_text(asked, served.chat_template, served.tokenizer)
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise Refusal(400, f"{param} holds half a character, a lone surrogate: send whole ones", param=param)
            try:
                return prompt_tokens(served.tokenizer, text, with_special=not is_chat)
            except ValueError as error:
                raise Refusal(400, str(error), param=param) from error

    @app.get("/health")
    async def health() -> JSONResponse:
        is_alive = served.worker.is_alive
        state = {"running": served.worker.running, "waiting": served.worker.waiting}
        return JSONResponse({"status": "ok" if is_alive else "stopped", **state}, 200 if is_alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(served.name, created, served.context)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(name, served)
        return model_card(served.name, created, served.context)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        _check_name(asked.model, served)
        prompt = await asyncio.to_thread(tokens_of, asked)
        new = asked.max_completion_tokens or asked.max_tokens
        return await _answer(request, served, asked, prompt, new, is_chat=True)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        _check_name(asked.model, served)
        prompt = await asyncio.to_thread(tokens_of, asked)
        new = asked.max_tokens or max(1, min(DEFAULT_COMPLETION, served.context - len(prompt)))
        return await _answer(request, served, asked, prompt, new, is_chat=False)

    return app


async def _answer(
    request: Request, served: Served, asked: Asked, prompt: list[int], new: int | None, is_chat: bool
) -> Response:
    """`new` tokens after `prompt`, as many as there is room for where it is None."""
    job = _begin(served, asked, prompt, new)
    reply = Reply(served, job, asked.stop or [], [] if is_chat else prompt[-REMEMBERED:])
    answer = Answer(served.name, is_chat)
    if asked.stream:
        return EventStream(_events(reply, answer, asked.includes_usage), job)

    async def whole() -> Response:
        text = "".join([piece async for piece in reply.pieces()])
        return JSONResponse(answer.whole(text, reply.reason, reply.usage))

    try:
        return await _unless_gone(request, whole)
    except (ValueError, RuntimeError) as error:
        raise Refusal(500, str(error)) from error
    finally:
        job.drop()


def _begin(served: Served, asked: Asked, prompt: list[int], new: int | None) -> Job:
    """Ask the worker; Refusal where the prompt leaves no room, or too many wait."""
    room = served.context - len(prompt)
    if room < (new or 1):
        wanted = "" if new is None else f" and max_tokens is {new}"
        raise Refusal(
            400,
            f"the prompt has {len(prompt)} tokens{wanted}, but prompt and answer together have room for "
            f"{served.context}: shorten the prompt{'' if new is None else ' or ask for fewer tokens'}",
            param="messages" if isinstance(asked, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    try:
        served.worker.decoder.check(prompt, new or room)
        return served.worker.submit(prompt, new or room, asked.sampling, served.worker.decoder.end_tokens)
    except ValueError as error:
        raise Refusal(400, str(error), param="prompt") from error
    except BusyError as error:
        raise Refusal(429, f"{error}: try again later") from error
    except RuntimeError as error:
        raise Refusal(503, str(error)) from error


async def _events(reply: Reply, answer: Answer, includes_usage: bool) -> AsyncGenerator[str]:
    try:
        if answer.is_chat:
            yield _event(answer.piece("", is_first=True))
        async with aclosing(reply.pieces()) as pieces:
            async for piece in pieces:
                yield _event(answer.piece(piece))
        yield _event(answer.piece(None, reply.reason))
        if includes_usage:
            yield _event(answer.counts(reply.usage))
    except (ValueError, RuntimeError) as error:
        yield _event(Refusal(500, str(error)).body())
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
    """The answer, given up as soon as the client hangs up."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(answer()), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=CLIENT_CLOSED)
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


def _check_name(name: str | None, served: Served) -> None:
    if name not in (None, served.name):
        message = f"there is no model {name!r} here, but {served.name!r}"
        raise Refusal(404, message, param="model", code="model_not_found")
