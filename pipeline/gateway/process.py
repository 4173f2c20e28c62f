"""The gateway process: uvicorn with the gateway's application, until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import ssl
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from pipeline import logs
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import StartupError
from pipeline.garbage_collector import tune_garbage_collector
from pipeline.gateway.app import make_app
from pipeline.gateway.server_protocol import HeadLimitedProtocol
from pipeline.gateway.service import Gateway
from pipeline.settings import Settings
from pipeline.tracing.http_spans import HttpTracer
from pipeline.tracing.provider import Tracing, start_tracing

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is held: longer than clients and proxies do, so that they close."""

BACKLOG = 2_048

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Server that tells the gateway when it begins to stop."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and finish the requests in flight."""
        self._gateway.readiness.is_stopping = True
        log.info("gateway stops: it finishes the requests in flight")
        await super().shutdown(sockets)


def run_gateway(settings: Settings) -> int:
    """Run a gateway until SIGTERM or SIGINT; return the exit code.

    Raises:
        RecurError: the gateway cannot start; the message says what to do.
    """
    logs.configure(settings.log_level, settings.log_format)
    checkpoint = load_checkpoint(settings)
    tracing = start_tracing(settings, "recur-gateway")
    gateway = Gateway(settings, checkpoint)
    tls = _tls_files(settings)
    sock = _listen(settings)
    config = uvicorn.Config(
        make_app(gateway, HttpTracer(tracing.tracer) if tracing else None),
        http=HeadLimitedProtocol,
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
        backlog=BACKLOG,
        **tls,
    )
    server = _Server(config, gateway)
    tune_garbage_collector()
    host, port = sock.getsockname()[:2]
    log.info(
        "gateway starts",
        extra={"model": checkpoint.digest, "gateway": gateway.id, "address": f"{host}:{port}"},
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(server, gateway, sock, tracing))
    log.info("gateway ends")
    return 0


async def _serve(
    server: _Server, gateway: Gateway, sock: socket.socket, tracing: Tracing | None
) -> None:
    """Start the gateway's parts, serve until a signal, and stop them; a signal ends the start.

    Raises:
        RecurError: a part cannot start.
    """
    loop = asyncio.get_running_loop()
    starting = asyncio.create_task(gateway.start())
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, starting.cancel)
    await asyncio.wait([starting])
    for number in STOP_SIGNALS:
        loop.remove_signal_handler(number)
        # uvicorn raises a signal again once it has stopped for it.
        signal.signal(number, _ignore)
    if starting.cancelled():
        return
    try:
        starting.result()
        await server.serve(sockets=[sock])
    finally:
        await gateway.stop()
        if tracing is not None:
            await tracing.stop()


def _tls_files(settings: Settings) -> dict[str, Any]:
    """Return uvicorn's options of TLS; none without a certificate.

    Raises:
        StartupError: a file cannot be read, or is no certificate with its key.
    """
    if settings.gateway_ssl_certfile is None:
        return {}
    files = {"ssl_certfile": str(settings.gateway_ssl_certfile)}
    if settings.gateway_ssl_keyfile is not None:
        files["ssl_keyfile"] = str(settings.gateway_ssl_keyfile)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.gateway_ssl_certfile, settings.gateway_ssl_keyfile, _refuse_encrypted_key
        )
    except (OSError, ssl.SSLError) as error:
        raise StartupError(
            f"the gateway's certificate or key cannot be loaded ({type(error).__name__}): see that"
            " RECUR_GATEWAY_SSL_CERTFILE and RECUR_GATEWAY_SSL_KEYFILE are PEM files that belong"
            " together"
        ) from error
    return files


def _refuse_encrypted_key() -> str:
    """Refuse a key that OpenSSL would ask a terminal's password for.

    Raises:
        StartupError: always.
    """
    raise StartupError(
        "the gateway's private key is encrypted: store it decrypted, readable only by the"
        " gateway's user (openssl pkey -in KEY -out RECUR_GATEWAY_SSL_KEYFILE)"
    )


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the server has stopped already."""


def _listen(settings: Settings) -> socket.socket:
    """Open the port, so that a taken one ends the start with its setting.

    Raises:
        StartupError: the port cannot be opened.
    """
    host, port = settings.gateway_host, settings.gateway_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise StartupError(
            f"cannot listen on {host}:{port} ({error.strerror}): set RECUR_GATEWAY_HOST and"
            " RECUR_GATEWAY_PORT to an address of this machine and a free port"
        ) from error
    return sock
