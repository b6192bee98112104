"""The app of `transformers serve` for the models and devices that the native engine does not have.

Its own command listens by itself and knows no key; here it is the app alone, to go behind ours.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from transformers.cli.serve import Serve

from sparse_bitnet.serving.errors import answer_in_openai_shape

NOT_SERVED = ("/load_model", "/reset", "/v1/models")  # other models, and a list of the cache where ours is not


class _NotYetListening(Serve):
    def start_server(self) -> None:
        pass


def create_transformers_app(model: str, device: str) -> FastAPI:
    """All requests are answered by `model`, which is opened now."""
    app = _NotYetListening(force_model=model, device=device, non_blocking=True).server.config.app
    assert isinstance(app, FastAPI)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in NOT_SERVED]
    answer_in_openai_shape(app)
    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "transformers"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    return app
