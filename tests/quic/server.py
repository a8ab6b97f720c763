"""A QUIC server whose connection IDs carry its server ID (QUIC-LB without encryption). It answers every line with its
name and the line. Knows no balancer."""

import argparse
import asyncio
import datetime
import os

from aioquic.asyncio import serve
from aioquic.quic import connection as quic_connection
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# Nothing else in aioquic's connections asks for so many random bytes: that is how connection IDs are told apart.
CONNECTION_ID_BYTES = 18
NONCE_BYTES = 4


class RoutableIds:
    """Stands in for `os` in aioquic's connections."""

    def __init__(self, config_id, server_id):
        self.config_id, self.server_id = config_id, server_id

    def urandom(self, count):
        if count != CONNECTION_ID_BYTES:
            return os.urandom(count)
        first_octet = self.config_id << 5 | (CONNECTION_ID_BYTES - 1)
        return bytes([first_octet]) + self.server_id + os.urandom(count - 1 - len(self.server_id))


def certificate():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "quic.xlb.test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256()), key


async def answer(name, reader, writer):
    while line := await reader.readline():
        writer.write(f"{name} ".encode() + line)
    writer.write_eof()


async def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, default=443)
    parser.add_argument("--name", required=True)
    parser.add_argument("--config-id", type=int, default=0)
    parser.add_argument("--server-id", type=bytes.fromhex, required=True)
    arguments = parser.parse_args()
    if not 1 <= len(arguments.server_id) < CONNECTION_ID_BYTES - NONCE_BYTES:
        parser.error("--server-id: 1 to 13 bytes in hex")

    quic_connection.os = RoutableIds(arguments.config_id, arguments.server_id)
    configuration = QuicConfiguration(
        alpn_protocols=["xlb"], is_client=False, idle_timeout=60, connection_id_length=CONNECTION_ID_BYTES
    )
    configuration.certificate, configuration.private_key = certificate()
    tasks = set()

    def stream(reader, writer):
        task = asyncio.ensure_future(answer(arguments.name, reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    await serve(arguments.address, arguments.port, configuration=configuration, stream_handler=stream)
    print("listening", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
