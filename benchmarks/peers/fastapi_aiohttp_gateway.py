"""The gateway in FastAPI and aiohttp's client: each request makes one downstream call."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel


class Result(BaseModel):
    result: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    connector = TCPConnector(limit=int(os.environ["DOWNSTREAM_CONNECTIONS"]))
    async with ClientSession(
        os.environ["DOWNSTREAM_URL"], connector=connector, timeout=ClientTimeout(total=5)
    ) as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/api/string")
async def get_string(request: Request) -> Result:
    try:
        async with request.app.state.client.get("/api/message", raise_for_status=True) as response:
            body = await response.json()
    except (ClientError, TimeoutError) as error:
        raise HTTPException(503) from error
    return Result(result=body["message"])
