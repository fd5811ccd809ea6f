"""A real S3 server for tests, which can be made to lag, to fail and to fill up."""

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote

BUCKET = "results"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Of whoever speaks with it."""
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
_LISTED = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
_GHOST = (
    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;0&quot;</ETag><Size>1</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


class ObjectStore:
    """S3 in a thread, with a middleman who spoils some of the answers."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        class Quiet(MotoRequestHandler):
            def log(self, *_: Any) -> None:
                """Nothing."""

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._frozen: tuple[set[str], set[str]] | None = None
        self.failures: list[tuple[int, str]] = []
        """Status and code of the answers to the next uploads, instead of what they asked for."""
        self.uploads = 0
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def uri(self, folder: str) -> str:
        return f"s3://{BUCKET}/{folder}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()

    @contextmanager
    def lagging(self) -> Iterator[None]:
        """Listings stay what they are, whatever is written and deleted meanwhile."""
        self._frozen = set(), set()
        try:
            yield
        finally:
            self._frozen = None

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"])
        self.requests.append(f"{method} {path}")
        key = path.removeprefix(f"/{BUCKET}/")
        if method == "PUT" and key != path and not key.endswith("/"):
            self.uploads += 1
            if self.failures:
                status, code = self.failures.pop(0)
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response(f"{status} {code}", [("Content-Type", "application/xml")])
                return [_ERROR.format(code=code).encode()]
            self._note(created=key)
        if method == "DELETE":
            self._note(deleted=key)
        if method == "GET" and "list-type=2" in environ["QUERY_STRING"] and self._frozen is not None:
            return self._stale(environ, start_response)
        return self._app(environ, start_response)

    def _note(self, created: str | None = None, deleted: str | None = None) -> None:
        if self._frozen is None:
            return
        new, old = self._frozen
        if created is not None and created not in old:
            new.add(created)
        if deleted is not None and deleted not in new:
            old.add(deleted)

    def _stale(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        asked = parse_qs(environ["QUERY_STRING"])
        prefix, held = asked.get("prefix", [""])[0], {}

        def hold(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            held.update(status=status, headers=headers)

        body = b"".join(self._app(environ, hold))
        new, old = self._frozen or (set(), set())
        hidden = [f"<Key>{key}</Key>".encode() for key in new]
        body = _LISTED.sub(lambda match: b"" if any(key in match[0] for key in hidden) else match[0], body)
        ghosts = "".join(_GHOST.format(key=key) for key in sorted(old) if key.startswith(prefix))
        body = body.replace(b"</ListBucketResult>", ghosts.encode() + b"</ListBucketResult>")
        headers = [(name, value) for name, value in held["headers"] if name.lower() != "content-length"]
        start_response(held["status"], [*headers, ("Content-Length", str(len(body)))])
        return [body]


def make_bucket(store: ObjectStore) -> None:
    import urllib.request

    request = urllib.request.Request(f"http://{store.endpoint}/{BUCKET}", method="PUT")
    urllib.request.urlopen(request).read()
