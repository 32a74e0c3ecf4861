"""Serves a converted network over HTTP by Ray Serve: requests that come together go through it together.

    pip install 'escort-sparse[ray]' 'ray[serve]'
    escort convert package.module:factory --input 1,3,224,224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\
        --output model.escort
    MODEL=model.escort serve run examples.serve:app
    curl --data-binary @photo.jpg http://127.0.0.1:8000/

Ray Serve gathers requests for at most WAIT_S, or until there are MOST of them. On a GPU there is a CUDA graph for each
power of two of samples, captured before the first request; a batch between two of them is padded. On a CPU the same
code runs as many samples as there are.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections import Counter

import numpy as np
import torch
from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import escort

MOST, WAIT_S = 32, 0.005


@serve.deployment(max_ongoing_requests=4 * MOST, ray_actor_options={"num_gpus": float(os.environ.get("GPUS", 0))})
class Classifier:
    """A network of images of bytes, (N, H, W, 3), which is saved in a file."""

    def __init__(self, path: str) -> None:
        self.model = escort.load(path)
        _, self.height, self.width, _ = self.model.plan.input_shapes[0]
        self.model.graphs.policy = "buckets"
        sizes = [2**power for power in range(MOST.bit_length())]
        self.model.warmup([(size, self.height, self.width, 3) for size in sizes])
        self.calls: Counter[int] = Counter()

    async def __call__(self, request: Request) -> JSONResponse:
        body = await request.body()
        try:
            pixels = await asyncio.to_thread(self.read, body)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return JSONResponse({"error": f"no readable image: {error}"}, status_code=400)
        return JSONResponse(await self.classify(pixels))

    @serve.batch(max_batch_size=MOST, batch_wait_timeout_s=WAIT_S)
    async def classify(self, images: list[np.ndarray]) -> list[dict[str, float]]:
        """One call of the network, in a thread, so that more requests are taken in meanwhile."""
        self.calls[len(images)] += 1
        scores = await asyncio.to_thread(self.predict, np.stack(images))
        return [{"top1": int(row.argmax()), "score": float(row.max())} for row in scores]

    def read(self, body: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(body), formats=["JPEG", "PNG", "WEBP"]) as image:
            return np.array(image.convert("RGB").resize((self.width, self.height), Image.Resampling.BILINEAR))

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.from_numpy(pixels).to(self.model.plan.device)).float().cpu().numpy()

    def statistics(self) -> Counter[int]:
        """How many calls of the network there were, by how many samples they had."""
        return self.calls


app = Classifier.bind(os.environ.get("MODEL", "model.escort"))
