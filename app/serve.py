"""`compose serve`: the HTTP API without the page; what it shares with `compose ui` lies here too."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from compose.app.bars import quiet_libraries
from compose.app.generate import loading_arguments
from compose.bases import BUNDLED
from compose.errors import RequestError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from compose.app.server.protect import Rules
    from compose.app.server.workshop import Opener, Workshop
    from compose.pipeline import ComposePipeline, Progress

KEYS = "COMPOSE_API_KEYS"  # environment: keys with commas between
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser, port: int = 8000) -> None:
    """Flags of `compose serve`, and of everything that serves."""
    where = parser.add_argument_group("where")
    where.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    where.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {port})")
    where.add_argument("--api-keys", type=Path, metavar="FILE", help=f"who has one of these keys (a line each) may call the API; {KEYS} in the environment does the same")  # fmt: skip
    where.add_argument(
        "--library", metavar="FOLDER", help="the library's folder (default: the user's data folder)"
    )
    where.add_argument("--jobs", type=Path, metavar="FOLDER", help="where finished pictures are kept (default: in the user's data folder)")  # fmt: skip
    where.add_argument("--queue", type=int, default=64, metavar="N", help="jobs that may wait before callers are sent away (default: 64)")  # fmt: skip
    base = parser.add_argument_group("base models")
    base.add_argument("--base", action="append", metavar="NAME", help=f"hub id, diffusers folder or .safetensors file; may be repeated, the first is loaded at once (default: {BUNDLED})")  # fmt: skip
    loading_arguments(base)


def run(args: argparse.Namespace) -> int:
    """Serve until ctrl-C. Raises RequestError before anything is loaded: a taken port, an open door."""
    rules = rules_of(args)
    sock = listen(args.host, args.port)
    from compose.app.server.api import make_app

    workshop = open_workshop(args)
    workshop.warm_up()
    print(f"{address(sock)}  (routes: /openapi.json; ctrl-C ends it)", flush=True)
    serve(make_app(workshop, rules), sock)
    return 0


def rules_of(args: argparse.Namespace) -> Rules:
    """Who may call. Raises RequestError where another machine could call without a key."""
    from compose.app.server.protect import Rules

    keys = read_keys(args.api_keys, os.environ.get(KEYS, ""))
    if args.host in LOOPBACK:
        return Rules(keys=keys)
    if keys is None:
        raise RequestError(
            f"--host {args.host} lets other machines in; give --api-keys FILE or set {KEYS}, or leave --host out"
        )
    return Rules(keys=keys, hosts=None)


def read_keys(path: Path | None, listed: str) -> tuple[str, ...] | None:
    """API keys of a file and of the environment; None where neither gives any. Raises RequestError."""
    keys = [key.strip() for key in listed.split(",")]
    if path is not None:
        try:
            keys += [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read the API keys in '{path}': {error}") from None
    keys = [key for key in keys if key and not key.startswith("#")]
    short = next((key for key in keys if len(key) < 8), None)
    if short is not None:
        raise RequestError("an API key has fewer than 8 characters; 'openssl rand -hex 24' makes a good one")
    if path is not None and not keys:
        raise RequestError(f"'{path}' holds no API key; write one a line")
    return tuple(keys) or None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, taken before anything heavy is done. Raises RequestError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot listen on {host} port {port}: {reason}; give another --port") from None
    return sock


def address(sock: socket.socket) -> str:
    """What to type into a browser."""
    host, port = sock.getsockname()[:2]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


def open_workshop(args: argparse.Namespace) -> Workshop:
    """Library, queue and bases, as the flags say; nothing heavy is loaded yet. Raises ComposeError."""
    from compose.app.jobs import Limits
    from compose.app.server.workshop import Workshop
    from compose.retrieval.library import Library

    folder = args.jobs or Path(platformdirs.user_data_path("lora-compose")) / "jobs"
    bases = tuple(dict.fromkeys(_absolute(base) for base in args.base or [BUNDLED]))
    if args.queue < 1:
        raise RequestError(f"--queue is {args.queue}; give 1 or more")
    library = Library.open(args.library)
    return Workshop(bases, opener(args), library, folder, limits=Limits(waiting=args.queue))


def _absolute(base: str) -> str:
    path = Path(base).expanduser()
    return str(path.resolve()) if base != BUNDLED and path.exists() else base


def opener(args: argparse.Namespace) -> Opener:
    """How bases are loaded here."""

    def open_base(
        base: str, progress: Progress
    ) -> ComposePipeline:  # torch is imported with the first base, after the server answers
        from compose.pipeline import ComposePipeline

        quiet_libraries()
        return ComposePipeline.from_pretrained(
            base, device=args.device, dtype=args.dtype, offload=args.offload, config=args.base_config,
            variant=args.variant, progress=progress,
        )  # fmt: skip

    return open_base


def serve(app: FastAPI, sock: socket.socket) -> None:
    """Answer on the socket until a signal comes; addresses (which may hold secrets) are never logged."""
    import uvicorn

    logging.getLogger("uvicorn.error").addFilter(_told)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3
    )
    uvicorn.Server(config).run(sockets=[sock])


def _told(line: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's is worth reading: callers that are cut off when the server ends are no fault."""
    cut = line.exc_info is not None and isinstance(line.exc_info[1], asyncio.CancelledError)
    return not cut and not line.getMessage().startswith("Cancel ")
