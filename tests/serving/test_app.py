"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from openai import APIError, AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

pytest.importorskip("sparse_bitnet._native", reason="the native kernels are not built")

from serving.conftest import Serve, Server
from sparse_bitnet.engine.decoder import Decoder
from sparse_bitnet.engine.sampling import Sampling
from sparse_bitnet.serving import worker

CHAT: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat sat"}]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3}


def post(server: Server, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(server.url + path, body, {"content-type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)


def health(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(server.url + "/health", timeout=30) as answer:
        return json.load(answer)


def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def test_a_chat(client: OpenAI, server: Server) -> None:
    """The text is that of the engine after the template's text, and the counts are its tokens."""
    name = server.served.name
    answer = client.chat.completions.create(model=name, messages=CHAT, max_tokens=12, temperature=0)
    tokenizer = server.served.tokenizer
    prompt = tokenizer("[system] be brief\n[user] the cat sat\n[assistant] ")["input_ids"]
    written = [token for _, token in Decoder(name).generate([prompt], 12)]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == tokenizer.decode(written).rstrip("\ufffd")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.usage.total_tokens == len(prompt) + 12
    assert (answer.object, answer.model) == ("chat.completion", name)


def test_a_chat_goes_on_to_the_end_of_the_context(serve: Serve) -> None:
    with serve(max_model_len=60).client() as client:
        answer = client.chat.completions.create(model="", messages=CHAT[1:], extra_body={"model": None})
        assert answer.usage is not None and answer.usage.total_tokens == 60


def test_what_is_streamed_is_what_is_answered_whole(client: OpenAI, server: Server) -> None:
    name = server.served.name
    whole = client.chat.completions.create(model=name, messages=CHAT, max_completion_tokens=200, **SAMPLED)
    stream = client.chat.completions.create(
        model=name, messages=CHAT, max_tokens=200, stream=True, stream_options={"include_usage": True}, **SAMPLED
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 20
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    texts = client.completions.create(model=name, prompt="the", max_tokens=50, **SAMPLED)
    streamed = client.completions.create(model=name, prompt="the", max_tokens=50, stream=True, **SAMPLED)
    assert "".join(chunk.choices[0].text for chunk in streamed) == texts.choices[0].text


def test_a_prompt_may_be_text_or_tokens(client: OpenAI, server: Server) -> None:
    text = "the old red barn"
    ids = server.served.tokenizer(text)["input_ids"]
    answers = [
        client.completions.create(model=server.served.name, prompt=prompt, temperature=0)
        for prompt in (text, [text], ids, [ids])
    ]
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert answers[0].usage is not None and answers[0].usage.completion_tokens == 16
    empty = client.completions.create(model=server.served.name, prompt="", max_tokens=2)
    assert empty.usage is not None and empty.usage.prompt_tokens == 1


def test_sampling_is_that_of_the_engine(client: OpenAI, server: Server) -> None:
    tokenizer = server.served.tokenizer
    prompt = tokenizer("the dog")["input_ids"]
    sampling = Sampling(temperature=0.7, top_k=40, top_p=0.8, repetition_penalty=1.2, seed=-5)
    written = [token for _, token in Decoder(server.served.name).generate([prompt], 40, sampling)]
    answer = client.completions.create(
        model=server.served.name, prompt=prompt, max_tokens=40, temperature=0.7, top_p=0.8, seed=-5,
        extra_body={"top_k": 40, "repetition_penalty": 1.2},
    )  # fmt: skip
    assert answer.choices[0].text == tokenizer.decode(prompt + written)[len(tokenizer.decode(prompt)) :].rstrip(
        "\ufffd"
    )
    unseeded = [
        client.completions.create(model=server.served.name, prompt=prompt, max_tokens=40).choices[0].text
        for _ in range(2)
    ]
    assert unseeded[0] != unseeded[1]


def test_a_stop_string_ends_a_text_before_it(client: OpenAI, server: Server) -> None:
    """Wherever it begins and however many tokens it takes, streamed or not."""
    asked: dict[str, Any] = {"model": server.served.name, "prompt": "the cat", "max_tokens": 60, **SAMPLED}
    text = client.completions.create(**asked).choices[0].text
    assert len(text) > 40
    for start in range(3, 30, 4):
        stop = text[start : start + 6]
        answer = client.completions.create(**asked, stop=[stop, "never there"])
        assert answer.choices[0].text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        streamed = list(client.completions.create(**asked, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == text[: text.index(stop)]
        assert streamed[-1].choices[0].finish_reason == "stop"
    assert client.completions.create(**asked, stop="never there").choices[0].text == text


def test_a_token_that_ends_texts_ends_the_answer(serve: Serve, model_directory: Path, tmp_path: Path) -> None:
    prompt = [5, 6, 7]
    written = [token for _, token in Decoder(model_directory).generate([prompt], 9)]
    for file in model_directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written[6]}))
    server = serve(model=tmp_path)
    with server.client() as client:
        answer = client.completions.create(model=str(tmp_path), prompt=prompt, temperature=0, max_tokens=30)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == written.index(written[6]) + 1


def test_several_clients_at_once_get_what_they_get_alone(serve: Serve) -> None:
    """12 at a time where 5 go on side by side, each with its own prompt, seed and length: equal to the last letter."""
    server = serve(most=5)
    most = 0

    def ask(number: int) -> str:
        nonlocal most
        with server.client() as client:
            stream = client.completions.create(
                model=server.served.name, prompt="the cat and the dog " * (1 + 20 * (number % 3)), seed=number,
                max_tokens=60 + 10 * number, stream=True,
            )  # fmt: skip
            text = ""
            for chunk in stream:
                text += chunk.choices[0].text
                most = max(most, server.served.worker.running)
            return text

    alone = [ask(number) for number in range(12)]
    assert most == 1
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == alone
    assert 1 < most <= 5
    assert health(server) == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_hangs_up_makes_room_at_once(serve: Serve, is_streamed: bool) -> None:
    """The answer would take 10 seconds; the one that waits behind it begins as soon as its client is gone."""
    server = serve(most=1, slow=0.005)
    body = json.dumps({"prompt": "the", "max_tokens": 2000, "stream": is_streamed}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    gone = socket.create_connection(server.bound.getsockname())
    gone.sendall(f"{head}\r\n\r\n".encode() + body)
    if is_streamed:
        assert b"200 OK" in gone.recv(100)
    until(lambda: health(server)["running"] == 1)
    waiting = threading.Thread(target=lambda: post(server, "/v1/completions", b'{"prompt": "a", "max_tokens": 3}'))
    waiting.start()
    until(lambda: health(server)["waiting"] == 1)
    started = time.monotonic()
    gone.close()
    waiting.join()
    assert time.monotonic() - started < 3
    until(lambda: health(server) == {"status": "ok", "running": 0, "waiting": 0}, 1.0)


def test_one_that_waits_can_hang_up_too(serve: Serve) -> None:
    server = serve(most=1, slow=0.005)
    with server.client() as client:
        first = client.completions.create(model=server.served.name, prompt="a", max_tokens=2000, stream=True)
        second = client.completions.create(model=server.served.name, prompt="b", max_tokens=2000, stream=True)
        until(lambda: health(server) == {"status": "ok", "running": 1, "waiting": 1})
        second.close()
        until(lambda: health(server) == {"status": "ok", "running": 1, "waiting": 0}, 2.0)
        first.close()
        until(lambda: health(server)["running"] == 0, 2.0)


def test_a_prompt_that_leaves_no_room_is_told_in_a_sentence(client: OpenAI, server: Server) -> None:
    name = server.served.name
    with pytest.raises(
        BadRequestError, match=r"the prompt has \d+ tokens, but prompt and answer together have room"
    ) as e:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "the cat " * 3000}])
    assert e.value.code == "context_length_exceeded" and e.value.param == "messages"
    with pytest.raises(BadRequestError, match=r"has 3 tokens and max_tokens is 2046, .* room for 2048: shorten"):
        client.completions.create(model=name, prompt=[1, 2, 3], max_tokens=2046)
    assert client.completions.create(model=name, prompt=[1] * 2047).usage.completion_tokens == 1  # type: ignore[union-attr]
    with pytest.raises(BadRequestError, match=r"the prompt has 2048 tokens and max_tokens is 1"):
        client.completions.create(model=name, prompt=[1] * 2048)


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"prompt": "a",', "the body is not JSON: Expecting property name", None),
        (b"\xff\xfe", "the body", None),
        (b"[" * 100_000, "POST /v1/completions: ", None),
        (b"[]", "the body is no JSON object", None),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens: Input should be greater than or equal to 1", "max_tokens"),
        (b'{"prompt": "a", "max_tokens": "9"}', "max_tokens: Input should be a valid integer", "max_tokens"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature: ", "temperature"),
        (b'{"prompt": "a", "temperature": -1}', "temperature: Input should be greater", "temperature"),
        (b'{"prompt": "a", "top_p": 0}', "top_p: Input should be greater than 0", "top_p"),
        (b'{"prompt": "a", "stop": [""]}', "stop.0: String should have at least 1 character", "stop.0"),
        (b'{"prompt": "a", "stop": ["1", "2", "3", "4", "5"]}', "stop: List should have at most 4 items", "stop"),
        (b'{"prompt": ["a", "b"]}', "2 prompts in a request are not served", "prompt"),
        (b'{"prompt": [1, 320]}', "token 320 is not in the vocabulary of 320", "prompt"),
        (b'{"prompt": []}', "the prompt is empty", "prompt"),
        (b'{"prompt": "a", "n": 2}', "n=2 is not served: leave n out", "n"),
        (b'{"prompt": "a", "logprobs": 5}', "logprobs=5 is not served", "logprobs"),
        (b'{"prompt": "a", "presence_penalty": 0.5}', "presence_penalty=0.5 is not served", "presence_penalty"),
        (b'{"prompt": "a", "top_k": 18446744073709551616}', "top_k: Input should be less than or equal to", "top_k"),
        (b'{"prompt": "a", "seed": 18446744073709551616}', "seed: Input should be less than 18446744073", "seed"),
        (b'{"prompt": "a", "stream_options": {"wings": 1}}', "stream_options.wings is unknown", "stream_options.wings"),
        (b'{"prompt": "a", "wings": true}', "wings is unknown: leave it out", "wings"),
        (b'{"prompt": "a", "max-tokens": 3}', "max-tokens is unknown: leave it out", "max-tokens"),
        (b'{"prompt": "a", "": 3}', "a key of no letters is unknown", ""),
        (b'{"prompt": [true]}', "prompt", "prompt"),
        (b'{"prompt": "\\ud800 a"}', "prompt holds half a character", "prompt"),
        (b'{"prompt": ["\\ud800"]}', "prompt holds half a character", "prompt"),
        (b'{"prompt": "a", "repetition_penalty": 1e-300}', "repetition_penalty: Input should be", "repetition_penalty"),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_is_told_why(server: Server, body: bytes, message: str, param: str | None) -> None:
    status, answer = post(server, "/v1/completions", body)
    assert status == 400, answer
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param


def test_fields_that_ask_for_nothing_are_taken(client: OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(
        model=server.served.name, messages=CHAT, n=1, logprobs=False, presence_penalty=0, user="me", tools=[],
        response_format={"type": "text"}, max_tokens=1,
    )  # fmt: skip
    assert answer.usage is not None and answer.usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "4", "tool_call_id": "1"}, "messages.0.role: Input should be 'system'"),
        ({"role": "user"}, "messages.0.content: Field required"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part of type 'image_url'"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "messages.0.tool_calls: Input should be None"),
        ({"role": "user", "content": "a", "wings": 1}, "messages.0.wings is unknown: leave it out"),
    ],
)
def test_a_message_that_is_no_text_is_refused(client: OpenAI, server: Server, message: Any, reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        client.chat.completions.create(model=server.served.name, messages=[message])


def test_more_messages_than_any_chat_has_are_refused(client: OpenAI, server: Server) -> None:
    with pytest.raises(BadRequestError, match="messages: List should have at most 4096 items"):
        client.chat.completions.create(model=server.served.name, messages=CHAT * 2049)


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(model=server.served.name, messages=CHAT, max_tokens=3)
    said: Any = {**answer.choices[0].message.model_dump(), "tool_calls": [], "annotations": []}
    client.chat.completions.create(model=server.served.name, messages=[*CHAT, said, *CHAT], max_tokens=1)


def test_a_template_can_make_use_of_names(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "named.jinja"
    file.write_text("{% for message in messages %}{{ message.name or 'nobody' }} {% endfor %}")
    server = serve(chat_template=file)
    with server.client() as client:
        answer = client.chat.completions.create(
            model=server.served.name, messages=[{**CHAT[1], "name": "dog"}, CHAT[1]], max_tokens=1
        )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(server.served.tokenizer("dog nobody ")["input_ids"])


def test_of_named_templates_the_default_is_taken(serve: Serve) -> None:
    server = serve()
    server.served.tokenizer.chat_template = {"default": "the cat", "rag": "the dog"}  # type: ignore[assignment]
    with server.client() as client:
        answer = client.chat.completions.create(model=server.served.name, messages=CHAT, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(server.served.tokenizer("the cat")["input_ids"])
        server.served.tokenizer.chat_template = {"rag": "the dog"}  # type: ignore[assignment]
        with pytest.raises(BadRequestError, match="the chat template refuses these messages"):
            client.chat.completions.create(model=server.served.name, messages=CHAT)


def test_streams_go_on_while_a_template_is_rendered(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server, may_end = serve(), threading.Event()
    render = server.served.tokenizer.apply_chat_template
    monkeypatch.setattr(
        server.served.tokenizer,
        "apply_chat_template",
        lambda *given, **named: (may_end.wait(20), render(*given, **named))[1],
    )
    body = json.dumps({"messages": CHAT, "max_tokens": 1}).encode()
    with ThreadPoolExecutor(1) as pool:
        chat = pool.submit(post, server, "/v1/chat/completions", body)
        assert post(server, "/v1/completions", b'{"prompt": [1], "max_tokens": 3}')[0] == 200
        assert not chat.done()
        may_end.set()
        assert chat.result()[0] == 200


def test_an_empty_prompt_that_no_token_begins_is_refused(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "empty.jinja"
    file.write_text("{{ '' }}")
    server = serve(chat_template=file)
    server.served.tokenizer.bos_token = server.served.tokenizer.eos_token = None
    for path, body, param in (
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/chat/completions", {"messages": CHAT}, "messages"),
    ):
        status, answer = post(server, path, json.dumps(body).encode())
        assert (status, answer["error"]["param"]) == (400, param)
        assert "no token that begins a text: give a prompt" in answer["error"]["message"]


def test_no_more_sequences_than_memory_has_room_for(
    serve: Serve, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine that has room for three and a half, and of one for a half."""
    each = Decoder(model_directory).cache_bytes(2048)
    pages = {"SC_PAGE_SIZE": each // 2, "SC_PHYS_PAGES": 7}
    assert serve().served.worker.most == 16
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert serve().served.worker.most == 3
    assert serve(most=3).served.worker.most == 3
    assert serve(most=7, max_model_len=1024).served.worker.most == 7
    with pytest.raises(ValueError, match=r"4 sequences of 2048 tokens can take .* GB of .*: lower --max-sequences or"):
        serve(most=4)
    pages["SC_PHYS_PAGES"] = 1
    with pytest.raises(ValueError, match=r"1 sequence of 2048 tokens can take .* GB of .*: lower --max-model-len$"):
        serve()


def test_parts_of_a_message_are_joined_and_developers_are_the_system(client: OpenAI, server: Server) -> None:
    def ask(messages: list[Any]) -> str | None:
        answer = client.chat.completions.create(
            model=server.served.name, messages=messages, max_tokens=20, temperature=0
        )
        return answer.choices[0].message.content

    parts = [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]
    assert ask([{"role": "developer", "content": parts}]) == ask([{"role": "system", "content": "be\nbrief"}])


def test_a_body_that_is_no_json_by_its_type_is_refused(server: Server) -> None:
    """A page of another site cannot send application/json without asking first, so nothing else is taken."""
    status, answer = post(server, "/v1/completions", b'{"prompt": "a"}', "text/plain")
    assert status == 400 and "it came as text/plain" in answer["error"]["message"]


def test_models_and_paths(client: OpenAI, server: Server) -> None:
    name = server.served.name
    assert [model.id for model in client.models.list()] == [name]
    assert client.models.retrieve(name).owned_by == "sparse-bitnet"
    with pytest.raises(NotFoundError, match="there is no model 'gpt-9' here, but") as error:
        client.completions.create(model="gpt-9", prompt="a")
    assert error.value.code == "model_not_found"
    with pytest.raises(NotFoundError, match="POST /v1/embeddings: Not Found"):
        client.embeddings.create(model=name, input="a")


def test_a_key_is_asked_for(serve: Serve) -> None:
    server = serve(api_key="s3cret")
    assert health(server)["status"] == "ok"
    for key in ("wrong", "s3crets", "s3cre"):
        with pytest.raises(AuthenticationError, match="the API key is missing or wrong"), server.client(key) as client:
            client.models.list()
    assert post(server, "/v1/completions", b"{}")[0] == 401
    with server.client("s3cret") as client:
        assert client.completions.create(model=server.served.name, prompt="a", max_tokens=1).choices


def test_a_body_that_is_too_large_is_413(serve: Serve) -> None:
    """With a length that says so, and in pieces without one; 16 times as much is not even read."""
    server = serve(largest_body=1000)
    for size in (1001, 15_000):
        with pytest.raises(APIError, match="the body is larger than 1000 bytes") as error, server.client() as client:
            client.completions.create(model="tiny", prompt="a" * size)
        assert getattr(error.value, "status_code", None) == 413
    with socket.create_connection(server.bound.getsockname()) as one:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        one.sendall(b"transfer-encoding: chunked\r\n\r\n" + 3 * (b"200\r\n" + 512 * b" " + b"\r\n") + b"0\r\n\r\n")
        assert b" 413 " in one.recv(100)
    fits = b'{"prompt": "a", "max_tokens": 1}'
    assert post(server, "/v1/completions", fits + b" " * (1000 - len(fits)))[0] == 200


def test_a_model_without_a_template_names_the_remedy(serve: Serve, model_directory: Path, tmp_path: Path) -> None:
    for file in model_directory.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    server = serve(model=tmp_path)
    with pytest.raises(BadRequestError, match="no chat template: use /v1/completions, or serve with --chat-template"):
        server.client().chat.completions.create(model=str(tmp_path), messages=CHAT)
    file = tmp_path / "own.jinja"
    file.write_text(
        "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}"
    )
    with serve(model=tmp_path, chat_template=file).client() as client:
        answer = client.chat.completions.create(model=str(tmp_path), messages=CHAT[:1], max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(server.served.tokenizer("be brief")["input_ids"])
        with pytest.raises(BadRequestError, match="the chat template refuses these messages: one at a time"):
            client.chat.completions.create(model=str(tmp_path), messages=CHAT)
        with pytest.raises(BadRequestError, match="the chat template refuses these messages"):
            client.chat.completions.create(
                model=str(tmp_path),
                messages=CHAT[:1],
                extra_body={"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            )


def test_too_many_that_wait_are_told_to_come_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MOST_WAITING", 0)
    with pytest.raises(RateLimitError, match="0 requests wait already: try again later"), serve().client() as client:
        client.completions.create(model=None, prompt="a")  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_fail_one_answer_and_a_fault_of_ours_all(serve: Serve) -> None:
    server = serve()
    decoder = server.served.worker.decoder
    forward = decoder.forward
    decoder.forward = lambda *given: forward(*given) * float("nan")  # type: ignore[method-assign]
    status, answer = post(server, "/v1/completions", b'{"prompt": "a"}')
    assert status == 500 and "the logits are not numbers" in answer["error"]["message"]
    with pytest.raises(APIError, match="the logits are not numbers"), server.client() as client:
        list(client.completions.create(model=server.served.name, prompt="a", stream=True))
    decoder.forward = forward  # type: ignore[method-assign]
    assert post(server, "/v1/completions", b'{"prompt": "a"}')[0] == 200
    decoder.forward = lambda *given: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    status, answer = post(server, "/v1/completions", b'{"prompt": "a"}')
    assert status == 500 and "the engine has stopped: division by zero" in answer["error"]["message"]
    assert post(server, "/v1/completions", b'{"prompt": "a"}')[0] == 503
    with pytest.raises(HTTPError, match="503"):
        health(server)
