"""sse-starlette on uvicorn, with aio-pika."""

import sys
from collections.abc import AsyncIterator

import aio_pika
import uvicorn
from obvious import Envelope
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

url, port = sys.argv[1:]


class Broker:
    async def start(self) -> None:
        self.connection = await aio_pika.connect(url)
        self.channel = await self.connection.channel()
        await self.channel.set_qos(prefetch_count=200)
        self.exchange = await self.channel.declare_exchange("events", aio_pika.ExchangeType.TOPIC, durable=True)

    async def events(self, user: str) -> AsyncIterator[ServerSentEvent]:
        queue = await self.channel.declare_queue(exclusive=True, auto_delete=True)
        await queue.bind(self.exchange, f"user.{user}.#")
        await queue.bind(self.exchange, "all.#")
        async with queue.iterator() as messages:
            await messages.consume()
            yield ServerSentEvent(event="ready", data="{}")
            async for message in messages:
                async with message.process():
                    event = Envelope.model_validate_json(message.body)
                    yield ServerSentEvent(id=event.id, event=event.type, data=event.model_dump_json())


broker = Broker()


async def events(request: Request) -> EventSourceResponse:
    return EventSourceResponse(broker.events(request.query_params["user"]), sep="\n")


class Server(uvicorn.Server):
    async def startup(self, sockets: list | None = None) -> None:
        await broker.start()
        await super().startup(sockets)
        print("serving", flush=True)


app = Starlette(routes=[Route("/events", events)])
Server(uvicorn.Config(app, port=int(port), backlog=4096, log_level="error", loop="uvloop", http="httptools")).run()
