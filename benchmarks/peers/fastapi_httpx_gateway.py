"""The gateway in FastAPI and httpx: each request makes one downstream call."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel


class Result(BaseModel):
    result: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # All connections are kept alive: by default httpx keeps 20 of 100 and opens the others anew each time.
    connections = int(os.environ["DOWNSTREAM_CONNECTIONS"])
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    # A request may wait for a free connection longer than the default of 5 s: an overload should show as latency.
    timeout = httpx.Timeout(5, pool=30)
    async with httpx.AsyncClient(
        base_url=os.environ["DOWNSTREAM_URL"], limits=limits, timeout=timeout, trust_env=False
    ) as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/api/string")
async def get_string(request: Request) -> Result:
    try:
        response = await request.app.state.client.get("/api/message")
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise HTTPException(503) from error
    return Result(result=response.json()["message"])
