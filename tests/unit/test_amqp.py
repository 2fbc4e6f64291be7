import asyncio
import contextlib
import gc
import threading
import warnings
import weakref

from yarl import URL

from bridge import amqp
from deploy.local.node import free_ports


def test_a_connection_that_failed_may_be_forgotten_in_any_thread() -> None:
    """The library's `__del__` makes a task, which needs a loop: the thread that collects the garbage may have none."""
    (port,) = free_ports(1)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    left: list[object] = []

    async def fail() -> None:
        amqp._quiet.set(True)  # A kept log record would hold the error, and that the connection.
        connection = amqp.BrokerConnection(URL(f"amqp://127.0.0.1:{port}/"))
        left.append(connection)
        with contextlib.suppress(ConnectionError):
            await connection.connect()

    def forget() -> None:
        left.clear()
        gc.collect()

    try:
        asyncio.run_coroutine_threadsafe(fail(), loop).result()
        forgotten = weakref.ref(left[0])
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            without_a_loop = threading.Thread(target=forget)
            without_a_loop.start()
            without_a_loop.join()
        assert forgotten() is None
        assert not [str(warning.message) for warning in heard]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
