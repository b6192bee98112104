"""`sparse-bitnet serve` as a process of its own: how it begins, what it says, how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, AuthenticationError, BadRequestError, OpenAI

pytest.importorskip("sparse_bitnet._native", reason="the native kernels are not built")

from sparse_bitnet.cli.main import main
from sparse_bitnet.serving.listen import bind, is_loopback, own_hosts

Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start(model_directory: Path) -> Iterator[Start]:
    """Starts the command on any free port and waits for its line: the process, and where it listens."""
    processes = []

    def run(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "sparse_bitnet", "serve", str(model_directory), "--port", "0", *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"at (http://127\.0\.0\.1:\d+/v1)$", line)
        assert found, line + (process.communicate(timeout=5)[1] if not line else "")
        return process, found[1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal(start: Start, model_directory: Path, number: int) -> None:
    """An answer that is on its way is finished first."""
    process, address = start(SPARSE_BITNET_API_KEY="s3cret", OMP_NUM_THREADS="1")
    asked: dict[str, Any] = {"model": str(model_directory), "prompt": "the", "max_tokens": 1500, "seed": 0}
    with OpenAI(base_url=address, api_key="wrong", max_retries=0) as client, pytest.raises(AuthenticationError):
        client.models.list()
    with OpenAI(base_url=address, api_key="s3cret", max_retries=0) as client:
        stream = iter(client.completions.create(**asked, stream=True))
        next(stream)
        process.send_signal(number)
        assert list(stream)[-1].choices[0].finish_reason == "length"
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_second_interrupt_waits_for_no_answer_and_ends_cleanly(start: Start, model_directory: Path) -> None:
    process, address = start(OMP_NUM_THREADS="1")
    with OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": str(model_directory), "prompt": "the", "max_tokens": 1900}
        streams = [iter(client.completions.create(**asked, stream=True)) for _ in range(4)]
        for stream in streams:
            next(stream)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "terminate called" not in err and "leaked" not in err


def test_transformers_serves_behind_the_same_guard(start: Start, model_directory: Path) -> None:
    process, address = start("--engine", "transformers", "--device", "cpu", "--api-key", "s3cret", OMP_NUM_THREADS="1")
    name = str(model_directory)
    with OpenAI(base_url=address, api_key="wrong", max_retries=0) as client, pytest.raises(AuthenticationError):
        client.models.list()
    with OpenAI(base_url=address, api_key="s3cret", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [name]
        messages: list[Any] = [{"role": "user", "content": "the cat"}]
        answer = client.chat.completions.create(model=name, messages=messages, max_tokens=5, temperature=0.5)
        assert answer.choices[0].message.role == "assistant"
        stream = client.chat.completions.create(model=name, messages=messages, max_tokens=5, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] is not None
        with pytest.raises(BadRequestError, match="the body is not JSON"):
            client.post("/completions", content=b"{", cast_to=object)
        with pytest.raises(APIError, match="larger than"):
            client.completions.create(model=name, prompt="a" * 5 * 2**20)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port 70000 is none from 0 to 65535"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7, port 8000: "),
        (["--host", "no such host"], "cannot listen on no such host, port 8000: "),
        (["--max-model-len", "4096"], "--max-model-len 4096 is beyond the model's context of 2048"),
        (["--chat-template", "none.jinja"], "--chat-template none.jinja cannot be read"),
        (["--api-key", ""], "must be of ASCII characters, and not empty"),
        (["--engine", "abacus"], "--engine abacus: choose from auto, native, transformers"),
        (["--engine", "transformers", "--max-model-len", "9"], "--max-model-len is of the native engine"),
        (["--engine", "transformers", "--max-sequences", "9"], "--max-sequences is of the native engine"),
        (["--engine", "transformers", "--head", "stored"], "--head is of the native engine"),
        (["--max-sequences", "99999999999"], "99999999999 sequences of 2048 tokens can take"),
        (["--head", "int3"], "head='int3' is none of int8, stored"),
    ],
)
def test_a_mistake_is_one_line(
    model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    if "--port" not in arguments and "--host" not in arguments:
        arguments = [*arguments, "--port", "0"]
    monkeypatch.setattr(sys, "argv", ["sparse-bitnet", "serve", str(model_directory), *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("option", ["--top-k", "--seed"])
def test_generate_takes_no_number_that_nothing_can_hold(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparse-bitnet", "generate", str(model_directory), option, str(2**64)])
    with pytest.raises(SystemExit) as end:
        main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert f"{option[2:].replace('-', '_')}={2**64} must lie from" in err


def test_a_model_without_a_tokenizer_is_one_line(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(model_directory / name)
    monkeypatch.setattr(sys, "argv", ["sparse-bitnet", "serve", str(tmp_path), "--port", "0"])
    with pytest.raises(SystemExit):
        main()
    err = capsys.readouterr().err
    assert f"no tokenizer could be read from {tmp_path}: there are no files of a tokenizer" in err
    assert err.count("\n") == 1


def test_a_site_that_leads_to_this_machine_is_refused(start: Start) -> None:
    _, address = start(OMP_NUM_THREADS="1")
    port = int(address.split(":")[2].partition("/")[0])

    def ask(host: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with closing(connection):
            connection.request("GET", "/v1/models", headers={"host": host})
            answer = connection.getresponse()
            return answer.status, answer.read()

    for own in (f"127.0.0.1:{port}", "localhost", "LOCALHOST:80", f"[::1]:{port}", "[::1]"):
        assert ask(own)[0] == 200
    for other in (f"evil.example:{port}", "localhost.evil.example", "127.0.0.1@evil", ""):
        status, answer = ask(other)
        assert status == 403
        assert json.loads(answer)["error"]["type"] == "permission_error"


def test_a_host_is_known_by_what_was_given_and_by_where_it_led() -> None:
    with bind("127.2", 0) as bound:
        assert own_hosts("127.2", bound) == {"localhost", "127.0.0.1", "[::1]", "127.2", "127.0.0.2"}


def test_a_port_that_is_taken_is_told_before_a_model_is_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            bind("127.0.0.1", port)


def test_only_this_machine_is_loopback() -> None:
    for host, expected in (("127.0.0.1", True), ("0.0.0.0", False)):
        with bind(host, 0) as bound:
            assert is_loopback(bound) == expected
