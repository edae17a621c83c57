"""`python -m demo`: choose models, load the first, serve the page until interrupted."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import ipaddress
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import catalogue, examples
from demo.session import Engines
from vlm.console import Parser, note, run_command
from vlm.errors import MissingPiece, ToolError, UserError

SILENT_MS = 100  # counted from the kernel's first retransmission, itself 200 ms or more after what was not confirmed


@dataclass(frozen=True)
class Options:
    """Where to serve, and who may come in."""

    host: str
    port: int
    auth: tuple[str, str] | None
    share: bool
    backend: str


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    options = _options(arguments)
    entries = catalogue.named(arguments.artifact) if arguments.artifact else catalogue.find()
    engines = Engines(entries, _loader(arguments.backend))
    try:
        with tempfile.TemporaryDirectory(prefix="align-edge-demo-") as folder:
            _import_meanwhile(Path(folder))
            default = _load_first(engines)
            _serve(engines, default, Path(folder), options)
    finally:
        engines.close()
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m demo",
        description="Ask models about pictures in a browser and see where each answer's milliseconds went.",
        epilog="example: python -m demo artifacts/student-onnx-int8 runs/first/student --port 7861",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "artifact",
        nargs="*",
        type=Path,
        metavar="ARTEFACT",
        help="artefact or checkpoint folder (default: all under artifacts/, and the newest student under runs/)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="default 7860; 0 takes a free one")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for a login; required beyond this machine")
    parser.add_argument("--share", action="store_true", help="public link through Gradio's relay; requires --auth")
    parser.add_argument(
        "--no-auth", action="store_true", help="let anybody in who can reach the page: only with --host or --share"
    )
    parser.add_argument("--backend", default="auto", help="run every model on this backend (default: by its format)")
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    auth: tuple[str, str] | None = None
    if arguments.auth is not None:
        user, _, password = str(arguments.auth).partition(":")
        if not user or not password:
            raise UserError("--auth needs both parts; write --auth user:password")
        auth = (user, password)
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port is {arguments.port}; give 1 to 65535, or 0 for a free one")
    if auth is not None and arguments.no_auth:
        raise UserError("--auth and --no-auth exclude each other; give one of them")
    _check_exposure(arguments, auth is not None)
    return Options(arguments.host, arguments.port, auth, arguments.share, arguments.backend)


def _check_exposure(arguments: argparse.Namespace, login: bool) -> None:
    """Refuse an open door nobody asked for, warn of one that somebody did."""
    risks = []
    if arguments.share:
        risks.append("--share puts the page on the internet")
    if not _is_loopback(arguments.host):
        risks.append(f"--host {arguments.host} lets other machines in")
    for risk in risks:
        if not login and not arguments.no_auth:
            raise UserError(f"{risk}; add --auth user:password (or --no-auth for an open door)")
        door = "behind a login" if login else "WITHOUT a login: anybody who reaches it can use this machine's model"
        note(f"warning: {risk}, {door}")
    if login and not _is_loopback(arguments.host):
        note("warning: http is not encrypted; over a network you do not trust use an SSH tunnel instead")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _loader(backend: str) -> Any:
    from runtime.engine_process import load_apart

    # beside a web server in the same process a fast model loses a fifth of its speed
    return lambda path: load_apart(path, backend=backend)


def _load_first(engines: Engines) -> str:
    """Load the first model that works, so that the page answers at once and a broken set-up is known before it opens."""
    *others, last = engines.entries
    for key in others:
        try:
            return _load(engines, key)
        except ToolError as error:
            note(f"not loaded: {error.message}")
    return _load(engines, last)


def _load(engines: Engines, key: str) -> str:
    note(f"loading {engines.entries[key].label}")
    engines.use(key)
    return key


def _import_meanwhile(folder: Path) -> None:
    """Gradio takes seconds to import: it does so while the model loads in its own process."""
    # set before the import: Gradio reads them then
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")

    def work() -> None:
        with contextlib.suppress(ImportError):  # `_serve` says what is missing
            importlib.import_module("gradio")

    threading.Thread(target=work, daemon=True).start()


def _serve(engines: Engines, default: str, folder: Path, options: Options) -> None:
    """Serve until interrupted; what people upload lies in `folder` and goes with it."""
    try:
        import gradio
    except ImportError:
        raise MissingPiece("the demo needs gradio; run `pip install 'gradio>=6.20,<7'`") from None
    from demo import app

    del gradio
    setting = app.Setting(examples.write(folder), default, folder / "profiles", options.backend)
    blocks = app.build(engines, setting)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    port = options.port
    try:
        port = port or free_port(options.host)
        _, local, public = blocks.launch(
            server_name=options.host,
            server_port=port,
            auth=options.auth,
            share=options.share,
            **app.launch_options(),
        )
    except OSError as error:
        raise UserError(f"cannot listen on {options.host}:{port}; if it is in use, choose another --port") from error
    give_up_on_silent_peers(blocks.server)
    try:
        print(f"demo ready at {public or local}", flush=True)
        note("press Ctrl-C to end")
        stop.wait()
    finally:
        blocks.close(verbose=False)


def give_up_on_silent_peers(server: Any) -> None:
    """Close connections whose other end confirms nothing: a cut network, unlike a closed tab, says nothing itself.

    Connections take the option over from the socket that accepted them. While an answer runs, something is sent at
    least every `HEARTBEAT_S`, so its generation ends within a second of the cut. Linux only (RFC 5482).
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    for listening in getattr(server, "servers", ()) if option is not None else ():
        for sock in listening.sockets:
            sock.setsockopt(socket.IPPROTO_TCP, option, SILENT_MS)


def free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run_command(main)
