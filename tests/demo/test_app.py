"""What the served page gives away over plain HTTP, without a browser."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from demo.catalogue import Entry
from demo.session import Engines
from runtime.backend_fake import FakeBackend
from runtime.engine import Engine

pytest.importorskip("gradio")
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    from demo import app
    from demo.__main__ import free_port

    opened: list[Any] = []

    def start(**options: Any) -> str:
        engines = Engines([Entry(Path("m"), "m", "onnx", "int8", 1, True)], lambda path: Engine(FakeBackend()))
        blocks = app.build(engines)
        opened.extend([engines, blocks])
        port = free_port("127.0.0.1")
        _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=port, **app.launch_options(), **options)
        return url.rstrip("/")

    start.opened = opened  # type: ignore[attr-defined]
    yield start
    for thing in reversed(opened):
        thing.close()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as reply:
        return json.load(reply)


def test_nothing_is_reported_kept_or_offered_to_programs(serve: Serve) -> None:
    url = serve()
    config = get(f"{url}/config")
    assert config["analytics_enabled"] is False
    assert get(f"{url}/gradio_api/info")["named_endpoints"] == {}


def test_without_the_password_there_is_no_page(serve: Serve) -> None:
    url = serve(auth=("user", "secret"))
    for path in ("/config", "/gradio_api/info"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(url + path)
        assert refused.value.code == 401


def test_a_path_that_was_not_uploaded_is_not_read(serve: Serve) -> None:
    url = serve()
    config = get(f"{url}/config")
    picture = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "picture")
    change = next(d["id"] for d in config["dependencies"] if [picture, "change"] in d["targets"])
    file = {"path": str(Path(__file__).resolve()), "meta": {"_type": "gradio.FileData"}}
    body = {"fn_index": change, "session_hash": "someone", "data": [[{"image": file, "caption": None}], None]}
    request = urllib.request.Request(
        f"{url}/gradio_api/run/predict", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code >= 400
    assert str(Path(__file__).parent) not in refused.value.read().decode()


def test_connections_give_up_on_a_cut_network(serve: Serve) -> None:
    """Whether the kernel then ends them is the kernel's business; here, that accepted ones are told to."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is None:
        pytest.skip("this system has no TCP_USER_TIMEOUT")
    from demo.__main__ import SILENT_MS, give_up_on_silent_peers

    with socket.create_server(("127.0.0.1", 0)) as listening:
        give_up_on_silent_peers(SimpleNamespace(servers=[SimpleNamespace(sockets=[listening])]))
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, option) == SILENT_MS
    url = serve()
    give_up_on_silent_peers(serve.opened[-1].server)  # type: ignore[attr-defined]
    assert get(f"{url}/config")["analytics_enabled"] is False  # it still serves
