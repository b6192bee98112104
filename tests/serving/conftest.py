"""A small packed model with a tokenizer and a chat template, and servers of it on free ports of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from openai import OpenAI
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config

from sparse_bitnet import Recipe, convert, prepare

pytest.importorskip("sparse_bitnet._native", reason="the native kernels are not built")

from sparse_bitnet.serving.app import Served, create_app, open_served
from sparse_bitnet.serving.guard import LARGEST_BODY, Guard
from sparse_bitnet.serving.listen import bind, url

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="session")
def model_directory(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 2 layers, 64 wide, for 320 tokens, a context of 2,048; no token ends its texts."""
    directory = tmp_path_factory.mktemp("served") / "tiny"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    convert(prepare(model, Recipe("6:8"))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


class Server:
    """A served model in a thread of this process; `slow` seconds are added to each step of the engine."""

    def __init__(self, served: Served, api_key: str | None, largest_body: int, slow: float) -> None:
        self.served, self.bound = served, bind("127.0.0.1", 0)
        self.url = url(self.bound)
        decoder = served.worker.decoder
        if slow:
            forward = decoder.forward
            decoder.forward = lambda *given: (time.sleep(slow), forward(*given))[1]  # type: ignore[method-assign]
        app = Guard(create_app(served), api_key, largest_body)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, ws="none"))
        self._thread = threading.Thread(target=self._server.run, args=([self.bound],))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def client(self, api_key: str = "any") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.bound.close()


Serve = Callable[..., Server]


@pytest.fixture(scope="module")
def serve(model_directory: Path) -> Iterator[Serve]:
    """Starts servers that end with the tests of a file."""
    servers = []

    def start(
        *,
        model: Path = model_directory,
        most: int | None = None,
        max_model_len: int | None = None,
        chat_template: Path | None = None,
        api_key: str | None = None,
        largest_body: int = LARGEST_BODY,
        slow: float = 0.0,
    ) -> Server:
        served = open_served(str(model), "int8", most, max_model_len, chat_template)
        servers.append(Server(served, api_key, largest_body, slow))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    return serve()


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client
