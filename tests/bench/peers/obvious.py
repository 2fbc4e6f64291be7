"""The simplest Python program: aio-pika's queue iterator, Quart, Hypercorn, a pydantic model."""

import asyncio
import sys
from collections.abc import AsyncIterator

import aio_pika
import uvloop
from hypercorn.asyncio import serve
from hypercorn.config import Config
from pydantic import BaseModel
from quart import Quart, Response, request


class Progress(BaseModel):
    job_id: str
    percent: float
    message: str = ""


class Envelope(BaseModel):
    specversion: str
    id: str
    source: str
    type: str
    data: Progress


async def main(url: str, port: str) -> None:
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=200)
    exchange = await channel.declare_exchange("events", aio_pika.ExchangeType.TOPIC, durable=True)
    app = Quart(__name__)

    @app.get("/events")
    async def events() -> Response:
        user = request.args["user"]

        async def send() -> AsyncIterator[bytes]:
            queue = await channel.declare_queue(exclusive=True, auto_delete=True)
            await queue.bind(exchange, f"user.{user}.#")
            await queue.bind(exchange, "all.#")
            async with queue.iterator() as messages:
                await messages.consume()
                yield b"event: ready\ndata: {}\n\n"
                async for message in messages:
                    async with message.process():
                        event = Envelope.model_validate_json(message.body)
                        yield f"id: {event.id}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()

        response = Response(send(), content_type="text/event-stream")
        response.timeout = None
        return response

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.backlog = 4096
    print("serving", flush=True)
    await serve(app, config)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
