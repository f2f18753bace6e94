"""`compose ui`: the studio in the browser, with the HTTP API in the same process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from compose.app import serve
from compose.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compose ui`: those of `compose serve`, and who may log in."""
    serve.add_arguments(parser, port=7860)
    parser.add_argument("--auth", metavar="USER:PASSWORD|@FILE", help="who may open the page (@FILE: one USER:PASSWORD a line); needed with --host")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Serve page and API until ctrl-C. There is no public link: nothing leaves this machine unasked."""
    auth = read_auth(args.auth)
    rules = rules_of(args, auth)
    sock = serve.listen(args.host, args.port)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from compose.app.server.api import make_app
    from compose.app.ui.studio import mount

    workshop = serve.open_workshop(args)
    app = mount(make_app(workshop, rules), workshop, auth)
    print(f"{serve.address(sock)}  (ctrl-C ends it)", flush=True)
    serve.serve(app, sock)
    return 0


def rules_of(args: argparse.Namespace, auth: list[tuple[str, str]] | None) -> serve.Rules:
    """Who may call. A page with a login leaves the API shut, unless keys open it. Raises RequestError."""
    from compose.app.server.protect import Rules

    if auth is None and args.host not in serve.LOOPBACK:
        raise RequestError(
            f"--host {args.host} lets other machines in; give --auth USER:PASSWORD, or leave --host out"
        )
    keys = serve.read_keys(args.api_keys, os.environ.get(serve.KEYS, ""))
    if auth is not None and keys is None:
        keys = ()
    return Rules(keys=keys) if args.host in serve.LOOPBACK else Rules(keys=keys, hosts=None)


def read_auth(text: str | None) -> list[tuple[str, str]] | None:
    """`USER:PASSWORD`, or `@FILE` with one a line -> pairs; None where nothing is given. Raises RequestError."""
    if text is None:
        return None
    lines = [text]
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read the logins in '{text[1:]}': {error}") from None
    pairs = [line.strip().partition(":")[::2] for line in lines if line.strip()]
    if not pairs or not all(user and len(password) >= 8 for user, password in pairs):
        raise RequestError("--auth needs USER:PASSWORD with at least 8 characters of password")
    return [(user, password) for user, password in pairs]
