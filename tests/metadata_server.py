"""The metadata server of one VM, for tests: the value `instance/preempted`, as strictly as Google's
answers for it.

Without the header Metadata-Flavor: Google a request is refused (403). With wait_for_change it is
answered when the ETag is another than last_etag, or after timeout_sec, with what there is then. Any
other parameter is refused (400), any other path unknown (404).
"""

import contextlib
import hashlib
import http.server
import threading
import urllib.parse

PATH = "/computeMetadata/v1/instance/preempted"


class MetadataServer:
    """On the loopback interface. host: what GCE_METADATA_HOST has to be. As a context: it ends with
    the block.

    flavor: of its answers; None: it is somebody else's server. down: it answers 503, as while it is
    restarted.
    """

    def __init__(self, flavor="Google", down=False):
        self.value, self.flavor, self.down = "FALSE", flavor, down
        self.changed = threading.Condition()
        self.answers = []  # the status of each answer
        self.waiting = 0  # requests that are held
        self.over = False
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with contextlib.suppress(ConnectionError):  # who asked may have ended
                    server.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.host = f"127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.changed:
            self.over = True
            self.changed.notify_all()
        self.http.shutdown()
        self.http.server_close()

    def etag(self):
        return hashlib.sha256(self.value.encode()).hexdigest()[:16]

    def preempt(self):
        with self.changed:
            self.value = "TRUE"
            self.changed.notify_all()

    def come_up(self):
        with self.changed:
            self.down = False

    def wait_until(self, condition, seconds=60):
        """Until `condition()`, which is looked at whenever something is asked or answered,
        holds."""
        with self.changed:
            assert self.changed.wait_for(condition, seconds), (self.answers, self.waiting)

    def answer(self, request):
        url = urllib.parse.urlsplit(request.path)
        query = dict(
            urllib.parse.parse_qsl(
                url.query, keep_blank_values=True, strict_parsing=bool(url.query)
            )
        )
        with self.changed:
            status, body = 200, None
            if (
                request.headers.get("Metadata-Flavor") != "Google"
                or "X-Forwarded-For" in request.headers
            ):
                status = 403
            elif url.path != PATH:
                status = 404
            elif set(query) - {"wait_for_change", "last_etag", "timeout_sec"}:
                status = 400
            elif self.down:
                status = 503
            elif query.get("wait_for_change", "false").lower() == "true":
                last, held = (
                    query.get("last_etag", self.etag()),
                    float(query.get("timeout_sec", 3600)),
                )
                self.waiting += 1
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.over or self.etag() != last, held)
                self.waiting -= 1
                if self.over:
                    return
            body = (self.value if status == 200 else f"error {status}").encode()
            etag = self.etag()
            self.answers.append(status)
            self.changed.notify_all()
        request.send_response(status)
        if self.flavor:
            request.send_header("Metadata-Flavor", self.flavor)
        if status == 200:
            request.send_header("ETag", etag)
            request.send_header("Content-Type", "application/text")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
