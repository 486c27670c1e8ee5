"""The review page's server as an attacker meets it, over real connections."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from antibackdoor.data.arrays import write_npz
from antibackdoor.data.core import Splits
from antibackdoor.data.load import load
from antibackdoor.errors import InputError
from antibackdoor.review.decisions import DROP, UNDECIDED, Decisions
from antibackdoor.review.session import Session, open_session
from toy import toy_images, toy_series
from toy_review import toy_run_of

server = pytest.importorskip("antibackdoor.review.server", reason="the extra `review` is not installed")
guard = pytest.importorskip("antibackdoor.review.guard")


class Client:
    """Requests with headers as given, nothing added but Host and length unless these are given too."""

    def __init__(self, address: str, session: Session):
        parts = urlsplit(address)
        self.port, self.root, self.session = parts.port, parts.path.rstrip("/"), session
        self.host = f"127.0.0.1:{self.port}"
        self.own = {"Host": self.host, "Origin": f"http://{self.host}", "Content-Type": "application/json"}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str | None) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {k: v for k, v in {**self.own, **given}.items() if v is not None}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            connection.putheader(name, value)
        if body is not None and "Content-Length" not in sent and "Transfer-Encoding" not in sent:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        read = answer.read()
        connection.close()
        return answer.status, read, answer.headers

    def get(self, path: str, **headers: str | None) -> tuple[int, Any]:
        status, read, _ = self.ask("GET", self.root + path, **headers)
        return status, json.loads(read) if read[:1] == b"{" else read

    def post(self, path: str, value: Any, **headers: str | None) -> tuple[int, Any]:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        status, read, _ = self.ask("POST", self.root + path, body, **headers)
        return status, json.loads(read) if read[:1] == b"{" else read


def started(session: Session) -> Iterator[Client]:
    told: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    def tell(address: str) -> None:
        told.append(address)
        ready.set()

    thread = threading.Thread(target=server.serve, args=(session,), kwargs={"ready": tell, "stop": stop})
    thread.start()
    try:
        assert ready.wait(20)
        yield Client(told[0], session)
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("review")
    data = toy_images(20)
    names = ["<script>alert(1)</script>\x1b[31m\u202egnp.exe", *data.ids[1:]]
    write_npz(folder / "set.npz", Splits(type(data)(data.x, data.y, data.spec, names)))
    yield from started(open_session(toy_run_of(load(folder / "set.npz"), folder / "run")))


def test_item(client: Client) -> None:
    status, start = client.get("/api/start")
    assert status == 200 and start["queues"] == {"flagged": 6, "all": 20} and start["classes"][3] == "class 3"
    status, item = client.get("/api/item/flagged/0")
    assert status == 200 and item["id"] == "<script>alert(1)</script>\\x1b[31m\\u202egnp.exe"  # nothing invisible
    assert item["label"] == "class 0" and item["suggested"] == {"code": 1, "name": "class 1"}
    assert [group["label"] for group in item["references"]] == ["class 0", "class 1"]
    assert len(item["strip"]) == 6 and client.get("/api/item/all/19")[1]["total"] == 20
    assert item["probability"] == "100%" and item["note"].startswith(f"{client.session.data.spec.shape[2]} ×")
    assert client.get("/picture/3")[1][:4] == b"\x89PNG"


def test_decide_undo_and_restart(client: Client) -> None:
    status, told = client.post("/api/decide", {"row": 4, "decision": "drop"})
    assert status == 200 and told["counts"]["drop"] == 1 and told["counts"]["open"] == 5
    assert Decisions(client.session.folder, client.session.data).codes[4] == DROP  # on the disk already
    assert client.post("/api/decide", {"row": 5, "decision": "relabel", "code": 2})[1]["decision"]["label"] == "class 2"
    assert client.get("/api/item/flagged/3")[1]["next"] == 0, "from the start again, since some are open before"
    assert client.get("/api/item/flagged/0")[1]["next"] == 1 and client.get("/api/item/flagged/5")[1]["next"] == 0
    assert client.post("/api/undo", {})[1]["positions"] == {"flagged": 5, "all": 5}
    assert client.post("/api/undo", {})[1]["row"] == 4
    assert client.post("/api/undo", {})[0] == 409
    assert (Decisions(client.session.folder, client.session.data).codes == UNDECIDED).all()


def test_export_goes_where_the_server_says(client: Client) -> None:
    status, told = client.post("/api/export", {"form": "npz", "undecided": "drop", "out": "/tmp/elsewhere"})
    assert status == 200 and told["told"].startswith("14 of 20 samples kept")
    assert len(load(client.session.folder / "cleaned-npz" / "data.npz").train) == 14
    assert client.post("/api/export", {"form": "npz", "undecided": "keep"})[0] == 200  # takes its place
    assert len(load(client.session.folder / "cleaned-npz" / "data.npz").train) == 20
    for form in ("../x", "", None, "pickle"):
        assert client.post("/api/export", {"form": form, "undecided": "drop"})[0] == 400


def test_headers_of_every_answer(client: Client) -> None:
    for path in (client.root + "/", client.root + "/api/start", client.root + "/static/review.js", "/nothing"):
        _, _, headers = client.ask("GET", path)
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store" and "server" not in headers
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "path", ["/", "/api/start", "/x/api/start", "//api/start", "/%2e%2e/api/start", "/" + "a" * 900]
)
def test_without_the_token(client: Client, path: str) -> None:
    assert client.ask("GET", path)[0] == 404
    assert client.ask("POST", "/wrong/api/decide", b'{"row": 0, "decision": "drop"}')[0] == 404


@pytest.mark.parametrize(
    "host", [None, "evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:{port}", "0.0.0.0:{port}"]
)
def test_another_host(client: Client, host: str | None) -> None:
    given = host and host.format(port=client.port)
    assert client.get("/api/start", Host=given)[0] == 400
    assert client.get("/api/start", Host=f"localhost:{client.port}")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": None}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "https://{host}"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": None}, 415),
        ({"Content_Length": "abc"}, 400),
        ({"Content_Length": "99999999999999999999"}, 413),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_changes_from_elsewhere(client: Client, headers: dict[str, str | None], status: int) -> None:
    given = {k: v and v.replace("{host}", client.host) for k, v in headers.items()}
    assert client.post("/api/decide", {"row": 0, "decision": "drop"}, **given)[0] == status
    assert client.session.decisions.codes[0] == UNDECIDED


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b'{"a":' * 200, 400),
        (b'{"row": 0, "decision": "burn"}', 400),
        (b'{"row": 0, "decision": "relabel"}', 400),
        (b'{"row": 0, "decision": "drop", "code": 1}', 400),
        (b'{"row": 0, "decision": "relabel", "code": 4}', 400),
        (b'{"row": 0, "decision": "relabel", "code": -1}', 400),
        (b'{"row": 0, "decision": "relabel", "code": "../../x"}', 400),
        (b'{"row": true, "decision": "drop"}', 400),
        (b'{"row": -1, "decision": "drop"}', 400),
        (b'{"row": 20, "decision": "drop"}', 400),
        (b'{"row": 1e99, "decision": "drop"}', 400),
        (b'{"row": "0", "decision": "drop"}', 400),
        (b"\xff\xfe", 400),
        (b" " * 3000, 413),
    ],
)
def test_bad_bodies(client: Client, body: bytes, status: int) -> None:
    assert client.post("/api/decide", body)[0] == status
    assert client.session.decisions.codes[0] == UNDECIDED


OUTSIDE = [
    "/look",  # nothing was recorded
    "/static/..%2f..%2fserver.py",
    "/static/../server.py",
    "/static/page.html",
    "/picture/99",
    "/picture/-1",
    "/picture/../../x",
    "/picture/99999999999999999999999",
    "/api/item/flagged/6",
    "/api/item/none/0",
    "/config.json",
    "/..%2f..%2fetc/passwd",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_but_what_there_is(client: Client, path: str) -> None:
    status, read = client.get(path)
    assert status == 404 and b"import" not in bytes(str(read), "utf-8")


def test_other_methods(client: Client) -> None:
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH"):
        assert client.ask(method, client.root + "/api/start")[0] == 405
    assert client.get("/api/decide")[0] == 405
    assert client.post("/api/start", {})[0] == 405


def test_headers_without_end(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000)
        assert sock.recv(64).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert client.get("/api/start")[0] == 200


def test_this_machine_only(client: Client) -> None:
    sock = server.listen()
    assert sock.getsockname()[0] == "127.0.0.1"
    sock.close()
    with pytest.raises(InputError, match="cannot listen"):
        server.listen(client.port)


@pytest.mark.parametrize("kind", ["image", "series"])
def test_where_the_second_head_looks(tmp_path: Path, kind: str) -> None:
    data = toy_images(20) if kind == "image" else toy_series(20)
    write_npz(tmp_path / "set.npz", Splits(data))
    folder = toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run")
    weight = np.zeros((8, 8), np.float32)
    weight[:, -2:] = 1
    mean = np.zeros((8, 8, 3), np.float32) if kind == "image" else weight
    maps = {"suspects": weight, "trusted": weight, "suspects_mean": mean, "trusted_mean": mean}
    np.savez(folder / "attention.npz", label="class 1", witness="second head", n=6, **maps)
    for client in started(open_session(folder)):
        look = client.get("/api/start")[1]["look"]
        assert look["label"] == "class 1" and look["title"] == "The second head looks here"
        assert look["words"].startswith("average of suspects, strongest")
        status, read = client.get("/look")
        assert status == 200 and (read[:4] == b"\x89PNG" if kind == "image" else read.count(b"<rect") == 2)


def test_series_as_curves(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", Splits(toy_series(12, unequal=True)))
    for client in started(open_session(toy_run_of(load(tmp_path / "set.npz"), tmp_path / "run"))):
        status, read, headers = client.ask("GET", client.root + "/picture/1")
        assert status == 200 and headers["content-type"] == "image/svg+xml" and read.count(b"<path") == 2
        assert client.get("/api/start")[1]["kind"] == "series"


RAW = {
    "two Hosts": (b"GET {root}/api/start HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n", b"400"),
    "no Host, old protocol": (b"GET {root}/api/start HTTP/1.0\r\n\r\n", b"400"),
    "another page's address": (b"GET http://evil.example{root}/api/start HTTP/1.1\r\nHost: {host}\r\n\r\n", b"404"),
    "two lengths": (
        b"POST {root}/api/undo HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Type: application/json\r\n"
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}}",
        b"400",
    ),
    "a length and chunks": (
        b"POST {root}/api/undo HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Type: application/json\r\n"
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"4",
    ),
    "a web socket": (
        b"GET {root}/ HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        b"200",  # the page, and no socket
    ),
    "no protocol at all": (b"\x16\x03\x01\x02\x00\x01\x00" + b"\x00" * 64 + b"\r\n\r\n", b"400"),
}


@pytest.mark.parametrize("case", RAW)
def test_requests_that_no_browser_sends(client: Client, case: str) -> None:
    sent, status = RAW[case]
    text = sent.replace(b"{root}", client.root.encode()).replace(b"{host}", client.host.encode())
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as sock:
        sock.sendall(text)
        assert sock.recv(64).split(b" ")[1].startswith(status)
    assert client.get("/api/start")[0] == 200 and (client.session.decisions.codes == UNDECIDED).all()


def test_clients_that_never_finish_keep_nobody_out(client: Client) -> None:
    slow = [socket.create_connection(("127.0.0.1", client.port), timeout=10) for _ in range(40)]
    try:
        for sock in slow:
            sock.sendall(b"GET " + client.root.encode() + b"/api/start HTTP/1.1\r\nHost: ")
        assert client.get("/api/start")[0] == 200
    finally:
        for sock in slow:
            sock.close()


HALVES = {
    "nothing": b"",
    "half a head": b"GET {root}/api/start HTTP/1.1\r\nHost: ",
    "half a body": b"POST {root}/api/undo HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n"
    b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{",
    "half a second one": b"GET {root}/api/start HTTP/1.1\r\nHost: {host}\r\n\r\nGET ",
}


@pytest.mark.parametrize("case", HALVES)
def test_connections_without_a_whole_request_are_closed(
    client: Client, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """More of them than are served at once keep the user out for some seconds only."""
    monkeypatch.setattr(guard, "PATIENCE", 1.0)
    text = HALVES[case].replace(b"{{", b"{").replace(b"{root}", client.root.encode())
    slow = [socket.create_connection(("127.0.0.1", client.port), timeout=10) for _ in range(70)]
    try:
        for sock in slow:
            sock.sendall(text.replace(b"{host}", client.host.encode()))
        for sock in slow:
            while sock.recv(4096):
                pass
        assert client.get("/api/start")[0] == 200
    finally:
        for sock in slow:
            sock.close()


def test_a_request_that_takes_long_is_answered(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    export = server.export
    monkeypatch.setattr(server, "export", lambda *given, **more: time.sleep(0.8) or export(*given, **more))
    assert client.post("/api/export", {"form": "npz", "undecided": "keep"})[0] == 200


def test_the_token_is_of_this_session_and_long(client: Client) -> None:
    assert len(client.root) > 30
    tokens = {server.secrets.token_urlsafe(24) for _ in range(50)}
    assert len(tokens) == 50 and client.root.strip("/") not in tokens
