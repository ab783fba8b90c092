"""A Hub on this machine that the real `huggingface_hub` client pushes to and loads from, and that fails on demand.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("me/model")
        hub.fail("commit", Refuse(503), DROP_AFTER)
        api.upload_folder(...)  # raises: 503
        api.upload_folder(...)  # raises: the connection is lost, but the commit is made
        assert hub.commits("me/model")[-1].files["config.json"] == b"{}"

The routes' names are the keys of `ROUTES`. It listens on the loopback interface only.
"""

import re
import socket
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repositories import NEED_TOKEN, ROUTES, Answer, HubError, Repositories, Request
from huggingface_hub.errors import HTTPError


# What the client speaks through, whose errors it lets pass: httpx2, and httpx before version 2.
httpx = import_module(HTTPError.__module__.partition(".")[0])


@dataclass(frozen=True)
class Refuse:
    """Answer with an error status instead of doing what is asked.

    Args:
        status: 429, 503, 504...
        headers: those that say when to come back, `{"Retry-After": "1"}` or `{"RateLimit": '"api";r=0;t=1'}` (seconds).
        body: HTML by default, as the gateways before the Hub send it. The client cannot parse that as JSON.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"<html><body>Try again later</body></html>"


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer. `after`: what was asked is done first, and the client cannot know."""

    after: bool = False


@dataclass(frozen=True)
class Slow:
    """Answer correctly, but only after `seconds`, and after as many again before each quarter of the body."""

    seconds: float


DROP, DROP_AFTER = Drop(), Drop(after=True)


class Hold:
    """One request that waits in the server until the test lets it go; `HubServer.hold` makes it.

    A request whose client has gone away meanwhile is forgotten.
    """

    def __init__(self, after):
        self.after = after
        self.reached, self.released = threading.Event(), threading.Event()

    def wait(self, seconds=60):
        """Until the request is here; TimeoutError if none comes."""
        if not self.reached.wait(seconds):
            raise TimeoutError(f"No request to hold came in {seconds} s")

    def release(self):
        self.released.set()


class HubServer:
    """The server, running inside its `with` block.

    Attributes:
        url: the client's `endpoint`.
        token: the only one that may write, and read private repositories.
        requests: every `(method, path)` received so far, in order; the path is without its query.
    """

    token = "hf_loopback"

    def __init__(self):
        self.requests = []
        self._faults = defaultdict(deque)
        self._holds = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._repositories = Repositories(self.url)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for hold in self._holds:
            hold.release()
        self._server.shutdown()
        self._server.server_close()

    def commits(self, repo, branch="main"):
        """The branch's commits, oldest first. The first is the Hub's own, with nothing but `.gitattributes`."""
        with self._lock:
            return list(self._repositories.branches[repo][branch])

    def fail(self, route, *faults):
        """Let the next requests of a route go wrong: one fault each, in this order, after those asked for before."""
        if route not in ROUTES:
            raise ValueError(f"No route {route!r}: one of {', '.join(ROUTES)}")
        with self._lock:
            self._faults[route].extend(faults)

    def hold(self, route, after=False):
        """Make the route's next request wait: before it is carried out or, with `after`, before it is answered."""
        held = Hold(after)
        self.fail(route, held)
        self._holds.append(held)
        return held

    def environment(self, home):
        """Variables under which a new process takes this for the Hub, with its caches in the folder `home`."""
        online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(home), **online}

    def constants(self, home):
        """What `huggingface_hub.constants` makes of those at its import, for a process that has it behind it."""
        return {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
        }

    def _next_fault(self, route):
        with self._lock:
            return self._faults[route].popleft() if self._faults[route] else None

    def _answer(self, route, request):
        """The right answer; one request at a time, so a commit is seen whole or not at all."""
        authorised = request.headers.get("Authorization") == f"Bearer {self.token}"
        try:
            if route in NEED_TOKEN and not authorised:
                raise HubError(401, "Invalid username or password.")
            with self._lock:
                private = request.repo in self._repositories.private and not authorised
                if request.repo and (private or request.repo not in self._repositories.branches):
                    raise HubError(404, "Repository not found", "RepoNotFound")
                return getattr(self._repositories, route)(request)
        except HubError as error:
            return error.answer


class _Handler(BaseHTTPRequestHandler):
    """HTTP, and what goes wrong with it. The request is always read to its end: its fate is decided after that."""

    protocol_version = "HTTP/1.1"
    # Headers and body are written separately: with Nagle's algorithm that costs 40 ms per request.
    disable_nagle_algorithm = True

    def serve(self):
        try:
            body = self.read_body()
            address = urlsplit(self.path)
            self.server.hub.requests.append((self.command, address.path))
            route, found = self.find_route(f"{self.command} {address.path}")
            fault = self.server.hub._next_fault(route)
            answer = self.carry_out(route, Request(parse_qs(address.query), self.headers, body, **found), fault)
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self.send(answer, pause=fault.seconds if isinstance(fault, Slow) else 0)
        except OSError:
            # The client has gone away.
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def carry_out(self, route, request, fault):
        """The answer, or None if the client is to get none."""
        if route is None:
            return Answer(404, b"", {})
        if isinstance(fault, Refuse):
            return Answer(fault.status, fault.body, {"Content-Type": "text/html", **fault.headers})
        if self.is_lost(fault, after=False):
            return None
        answer = self.server.hub._answer(route, request)
        return None if self.is_lost(fault, after=True) else answer

    def is_lost(self, fault, after):
        """Whether the exchange ends here, before or after the request is carried out. Waits if the test holds it."""
        if isinstance(fault, Hold) and fault.after == after:
            fault.reached.set()
            fault.released.wait()
            return self.is_client_gone()
        return fault == Drop(after)

    def is_client_gone(self):
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False

    def find_route(self, line):
        for route, pattern in ROUTES.items():
            if found := re.fullmatch(pattern, line):
                return route, {name: value and unquote(value) for name, value in found.groupdict().items()}
        return None, {}

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline() or "0", 16):
            chunks.append(self.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def read(self, size):
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("The client went away in the middle of its request")
        return data

    def send(self, answer, pause=0):
        time.sleep(pause)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not pause:
            self.wfile.write(answer.body)
            return
        quarter = max(1, -(-len(answer.body) // 4))
        for start in range(0, len(answer.body), quarter):
            time.sleep(pause)
            self.wfile.write(answer.body[start : start + quarter])

    def log_message(self, *_):
        """Nothing: `requests` holds what is worth knowing."""
