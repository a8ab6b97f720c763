"""QUIC connections that send a numbered line every now and then, and tell what became of each. SIGUSR1: all of them go
on from another port, and another address if there is one, with another connection ID. SIGTERM: the report, a line of JSON for each, and the end."""

import argparse
import asyncio
import json
import signal
import ssl

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

HANDSHAKE_SECONDS = 20
# For the last answers; a lost server never gives them.
PATIENCE_SECONDS = 8


class Connection:
    def __init__(self, server, addresses):
        self.server, self.addresses = server, addresses
        self.protocol = self.reader = self.writer = self.transport = None
        self.ends, self.servers = [], []
        self.sent = self.answered = 0
        self.error = None
        self.ending = False

    async def open(self):
        configuration = QuicConfiguration(
            alpn_protocols=["xlb"], is_client=True, idle_timeout=60, verify_mode=ssl.CERT_NONE
        )
        self.protocol = QuicConnectionProtocol(QuicConnection(configuration=configuration))
        await self.move_on()
        self.protocol.connect(self.server)
        await asyncio.wait_for(self.protocol.wait_connected(), HANDSHAKE_SECONDS)
        self.reader, self.writer = await self.protocol.create_stream()

    async def move_on(self):
        """Puts the connection on a socket of its own; aioquic has no word for it."""
        before = self.transport
        address = self.addresses[len(self.ends) % len(self.addresses)]
        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_datagram_endpoint(lambda: self.protocol, local_addr=(address, 0))
        self.ends.append(self.transport.get_extra_info("sockname")[:2])
        if before is not None:
            self.protocol.change_connection_id()
            before.close()

    async def talk(self, every):
        try:
            # One more exchange after the end was asked for: it shows where the last move led.
            last = False
            while not last:
                last = self.ending
                self.sent += 1
                self.writer.write(f"{self.sent}\n".encode())
                line = await self.reader.readline()
                if not line:
                    raise ConnectionError("the connection has ended")
                name, number = line.decode().split()
                if int(number) != self.sent:
                    raise ConnectionError(f"{number} is answered in place of {self.sent}")
                self.answered += 1
                if self.servers[-1:] != [name]:
                    self.servers.append(name)
                await asyncio.sleep(every)
        except (ConnectionError, ValueError) as error:
            self.error = str(error) or type(error).__name__

    def report(self):
        print(
            json.dumps(
                {
                    "ends": self.ends,
                    "servers": self.servers,
                    "sent": self.sent,
                    "answered": self.answered,
                    "error": self.error,
                }
            ),
            flush=True,
        )


async def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--port", type=int, default=443)
    parser.add_argument("--from", dest="addresses", action="append", required=True, help="an address of this host")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--every", type=float, default=0.2, help="seconds between an answer and the next line")
    arguments = parser.parse_args()

    loop = asyncio.get_running_loop()
    end, move = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    loop.add_signal_handler(signal.SIGUSR1, move.set)
    connections = [Connection((arguments.server, arguments.port), arguments.addresses) for _ in range(arguments.connections)]
    for connection in connections:
        await connection.open()
    talks = [asyncio.ensure_future(connection.talk(arguments.every)) for connection in connections]
    while not all(connection.answered or connection.error for connection in connections):
        await asyncio.sleep(0.02)
    print("connected", flush=True)

    waiting = asyncio.ensure_future(end.wait())
    while not end.is_set():
        moving = asyncio.ensure_future(move.wait())
        await asyncio.wait([waiting, moving], return_when=asyncio.FIRST_COMPLETED)
        moving.cancel()
        if move.is_set():
            move.clear()
            for connection in connections:
                await connection.move_on()
            print("moved", flush=True)
    for connection in connections:
        connection.ending = True
    _, silent = await asyncio.wait(talks, timeout=PATIENCE_SECONDS)
    for connection, talk in zip(connections, talks):
        if talk in silent:
            connection.error = f"no answer to {connection.sent}"
            talk.cancel()
        connection.report()


asyncio.run(main())
