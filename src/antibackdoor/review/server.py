"""The review page's server: what the page may ask for, and nothing else; who may ask, `guard` decides."""

from __future__ import annotations

import base64
import io
import json
import secrets
import socket
import threading
from collections.abc import Callable
from importlib import resources
from typing import Any, TypeGuard, cast

import numpy as np
import numpy.typing as npt
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from antibackdoor.errors import InputError
from antibackdoor.report.looks import looks
from antibackdoor.report.pictures import HEIGHT, WIDTH, picture
from antibackdoor.report.run import read_attention
from antibackdoor.report.words import percent, plain
from antibackdoor.review.decisions import UNDECIDED
from antibackdoor.review.export import FORMS, export
from antibackdoor.review.guard import HOST, LARGEST_BODY, PATIENCE, Guard, Impatient
from antibackdoor.review.session import Session

STRIP = 12
REFERENCES = 4
MOST_CLASSES = 1000
"""More class names than these are not offered for relabeling; the suggested one always is."""
STATIC = {"review.js": "text/javascript", "review.css": "text/css", "icon.svg": "image/svg+xml"}


class Page:
    """What the browser asks for. Positions count the queue of one filter, rows the data set."""

    def __init__(self, session: Session):
        self.session, self.data, self.decisions = session, session.data, session.decisions
        ranked = session.flagged[session.order]
        self.queues = {"flagged": session.order[ranked], "all": session.order}
        self.exporting = threading.Lock()
        self.trusted = self._trusted()
        self.looks = looks(read_attention(session.folder / "attention.npz"))

    def routes(self) -> list[Route]:
        """The whole surface."""
        return [
            Route("/", self.page),
            Route("/static/{name}", self.static),
            Route("/picture/{row:int}", self.picture),
            Route("/look", self.look),
            Route("/api/start", self.start),
            Route("/api/item/{queue}/{position:int}", self.item),
            Route("/api/decide", self.decide, methods=["POST"]),
            Route("/api/undo", self.take_back, methods=["POST"]),
            Route("/api/export", self.export, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        """The page itself; it holds nothing of the data."""
        return Response(_resource("page.html"), media_type="text/html")

    async def static(self, request: Request) -> Response:
        """Script and style, from the package."""
        name = request.path_params["name"]
        return Response(_resource(name), media_type=STATIC[name]) if name in STATIC else _error(404, "not found")

    def start(self, request: Request) -> Response:
        """What stays the same."""
        spec = self.data.spec
        names = [plain(name) for name in spec.classes[:MOST_CLASSES]]
        return JSONResponse({
            "run": plain(self.session.folder.resolve().name),
            "kind": spec.kind,
            "classes": names,
            "queues": {name: len(rows) for name, rows in self.queues.items()},
            "first": self._open_after("flagged", -1),
            "look": self.looks and {
                "label": plain(self.looks.label),
                "title": plain(f"The {self.looks.witness} looks here"),
                "words": plain(f"average of suspects, {self.looks.suspects.words}"),
            },
        })  # fmt: skip

    def item(self, request: Request) -> Response:
        """One sample of a queue with its neighbors, and samples of its class that nothing speaks against."""
        queue, position = request.path_params["queue"], request.path_params["position"]
        rows = self.queues.get(queue)
        if rows is None or not 0 <= position < len(rows):
            return _error(404, "no such sample")
        row = int(rows[position])
        told = self.session.table.iloc[row]
        given, suggested = int(self.data.y[row]), int(self.session.suggested[row])
        return JSONResponse({
            "row": row,
            "position": position,
            "total": len(rows),
            "id": plain(told["id"]),
            "label": self._class(given),
            "suggested": None if suggested < 0 else {"code": suggested, "name": self._class(suggested)},
            "score": float(np.nan_to_num(told["score"])),
            "probability": percent(float(told["probability"])),
            "note": picture(self._sample(row)).note,
            "flagged": bool(self.session.flagged[row]),
            "reason": plain(told["reason"]),
            "decision": self._decision(row),
            "next": self._open_after(queue, position),
            "strip": [
                {"row": int(r), "position": p, "decision": self._decision(int(r))}
                for p, r in enumerate(rows[position : position + STRIP], start=position)
            ],
            "references": [self._references(k) for k in dict.fromkeys((given, suggested)) if k >= 0],
            "counts": self._counts(),
        })  # fmt: skip

    async def decide(self, request: Request) -> Response:
        """{"row", "decision", "code"?}: note it, and answer with the counts. "code" is the number of a class."""
        body = await _body(request)
        row, decision, code = body.get("row"), body.get("decision"), body.get("code")
        classes = self.data.spec.classes
        if not _whole(row) or not 0 <= row < len(self.data):
            return _error(400, "no such sample")
        if code is not None and (not _whole(code) or not 0 <= code < len(classes)):
            return _error(400, "no such class")
        new = self.decisions.code(str(decision), None if code is None else classes[code])
        await run_in_threadpool(self.decisions.put, [(row, new)])
        return JSONResponse({"counts": self._counts(), "decision": self._decision(row)})

    async def take_back(self, request: Request) -> Response:
        """Undo the last decision, of this session or an earlier one; answers with its row."""
        await _body(request)
        row = await run_in_threadpool(self.decisions.undo)
        if row is None:
            return _error(409, "nothing to take back")
        positions = {name: np.flatnonzero(rows == row) for name, rows in self.queues.items()}
        return JSONResponse({
            "row": row,
            "positions": {name: int(found[0]) for name, found in positions.items() if len(found)},
            "counts": self._counts(),
        })  # fmt: skip

    async def export(self, request: Request) -> Response:
        """{"form", "undecided"}: write DIR/cleaned-FORM; a request cannot choose another place."""
        body = await _body(request)
        form, undecided = body.get("form"), body.get("undecided")
        if form not in FORMS or undecided not in ("drop", "keep", "suggest"):
            return _error(400, "no such format")
        out = self.session.folder / f"cleaned-{form}"

        def write() -> str:
            with self.exporting:
                return export(self.session, out, form, undecided, replace=True)

        told = await run_in_threadpool(write)
        return JSONResponse({"told": told, "folder": plain(str(out))})

    def picture(self, request: Request) -> Response:
        """A sample as an image file: PNG of the pixels, or SVG of the curves."""
        row = request.path_params["row"]
        if row >= len(self.data):
            return _error(404, "no such sample")
        sample = self._sample(row)
        if self.data.spec.kind == "image":
            buffer = io.BytesIO()
            Image.fromarray(sample[..., 0] if sample.shape[2] == 1 else sample).save(buffer, format="PNG")
            return Response(buffer.getvalue(), media_type="image/png")
        return Response(_curves(picture(sample).paths), media_type="image/svg+xml")

    def look(self, request: Request) -> Response:
        """Where a network looks in the suspects of one class, the picture of the report as a file."""
        if self.looks is None:
            return _error(404, "not found")
        drawn = self.looks.suspects.picture
        if drawn.src:
            return Response(base64.b64decode(drawn.src.partition(",")[2]), media_type="image/png")
        return Response(_curves(drawn.paths, drawn.bands or ""), media_type="image/svg+xml")

    def _sample(self, row: int) -> npt.NDArray[Any]:
        """A sample as the report draws it: pixels (H, W, C), or a series without its padding."""
        stored = self.data.x[torch.tensor([row])][0].cpu().numpy()
        if self.data.spec.kind == "image":
            return stored.transpose(1, 2, 0)
        return stored if self.data.lengths is None else stored[:, : int(self.data.lengths[row])]

    def _class(self, code: int) -> str:
        return plain(self.data.spec.classes[code])

    def _decision(self, row: int) -> dict[str, Any]:
        code = int(self.decisions.codes[row])
        if code >= 0:
            return {"name": "relabel", "label": self._class(code)}
        return {"name": {-1: "undecided", -2: "keep", -3: "drop"}[code], "label": None}

    def _open_after(self, queue: str, position: int) -> int | None:
        """The next other position of a queue that nobody decided about, from the start after the end; or None."""
        found = np.flatnonzero(self.decisions.codes[self.queues[queue]] == UNDECIDED)
        found = found[found != position]
        return int(found[np.searchsorted(found, position) % len(found)]) if len(found) else None

    def _counts(self) -> dict[str, int]:
        codes, flagged = self.decisions.codes, self.session.flagged
        return {
            "keep": int((codes == -2).sum()),
            "drop": int((codes == -3).sum()),
            "relabel": int((codes >= 0).sum()),
            "open": int((flagged & (codes == UNDECIDED)).sum()),
            "flagged": int(flagged.sum()),
            "all": len(codes),
        }

    def _trusted(self) -> list[list[int]]:
        """For each class the rows that look least suspicious."""
        y = self.data.y.cpu().numpy()
        kept: list[list[int]] = [[] for _ in self.data.spec.classes]
        missing = len(np.unique(y)) * REFERENCES
        for row in self.session.order[::-1].tolist():
            if missing == 0:
                break
            if len(kept[y[row]]) < REFERENCES and not self.session.flagged[row]:
                kept[y[row]].append(row)
                missing -= 1
        return kept

    def _references(self, label: int) -> dict[str, Any]:
        return {"label": self._class(label), "rows": self.trusted[label]}


def make_app(session: Session, token: str, port: int) -> ASGIApp:
    """The page behind its guard."""

    async def told(request: Request, error: Exception) -> Response:
        return _error(400, plain(str(error)))

    app = Starlette(
        routes=Page(session).routes(),
        exception_handlers=cast(Any, {InputError: told, ValueError: told}),
    )
    return Guard(app, token, port)


def listen(port: int = 0) -> socket.socket:
    """A socket on this machine's own address; port 0 lets the system choose."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, port))
    except OSError as error:
        sock.close()
        raise InputError(f"cannot listen on {HOST}:{port}: {error.strerror or error}; choose another --port.") from None
    return sock


def serve(
    session: Session, port: int = 0, *, ready: Callable[[str], object], stop: threading.Event | None = None
) -> None:
    """Serve the page until interrupted (or `stop` is set); `ready` gets the address once, with its token."""
    token = secrets.token_urlsafe(24)
    session.decisions.hold()
    sock = listen(port)
    try:
        own = sock.getsockname()[1]
        config = uvicorn.Config(
            make_app(session, token, own),
            log_level="critical",
            access_log=False,  # it would keep the token
            server_header=False,
            limit_concurrency=64,
            timeout_keep_alive=PATIENCE,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=16 * 1024,
            ws="none",
            http=Impatient,
            lifespan="off",
        )
        server = _Server(config, lambda: ready(f"http://{HOST}:{own}/{token}/"), stop)
        server.run(sockets=[sock])
    finally:
        sock.close()
        session.decisions.release()


class _Server(uvicorn.Server):
    """Tells when it listens, and looks at `stop` now and then."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], object], stop: threading.Event | None):
        super().__init__(config)
        self._ready, self._stop = ready, stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """True ends the server; asked ten times a second."""
        return await super().on_tick(counter) or (self._stop is not None and self._stop.is_set())


async def _body(request: Request) -> dict[str, Any]:
    """A small JSON object; what arrives is counted, whatever the header told."""
    read = b""
    async for piece in request.stream():
        read += piece
        if len(read) > LARGEST_BODY:
            raise InputError("too much")
    try:
        value = json.loads(read)
    except (ValueError, RecursionError):
        raise InputError("that is no JSON") from None
    if not isinstance(value, dict):
        raise InputError("that is no JSON object")
    return value


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _error(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status)


def _curves(paths: tuple[str, ...], bands: str = "") -> str:
    """An SVG file of the paths, over the bands of a `Picture`; as an image it runs no script and loads nothing."""
    colors = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#868e96")
    drawn = "".join(
        f'<path d="{d}" fill="none" stroke="{colors[i % len(colors)]}" stroke-width="1.5" '
        'vector-effect="non-scaling-stroke"/>'
        for i, d in enumerate(paths)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'preserveAspectRatio="none"><g fill="#e0672f" opacity="0.75">{bands}</g>{drawn}</svg>'
    )


def _resource(name: str) -> str:
    return (resources.files("antibackdoor.review") / "templates" / name).read_text(encoding="utf-8")
