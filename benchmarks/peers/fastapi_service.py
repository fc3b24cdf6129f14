"""The message service in FastAPI and asyncpg: each request makes one query, prepared by asyncpg once a connection."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel


class Message(BaseModel):
    message: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool(
        host=os.environ["DB_HOST"],
        port=int(os.environ["DB_PORT"]),
        user=os.environ["DB_USER"],
        database=os.environ["DB_NAME"],
        min_size=int(os.environ["DB_POOL_SIZE"]),
        max_size=int(os.environ["DB_POOL_SIZE"]),
    ) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/api/message")
async def get_message(request: Request) -> Message:
    content = await request.app.state.pool.fetchval("SELECT content FROM messages ORDER BY id LIMIT 1")
    if content is None:
        raise HTTPException(404)
    return Message(message=content)
