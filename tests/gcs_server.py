"""Cloud Storage for tests: gcp-storage-emulator in a process of its own, and in front of it a proxy
that fails as a test wants.

The proxy also does what the emulator leaves out: preconditions (ifGenerationMatch). A test names
its faults; each applies to the next requests that match it. Everything is on the loopback
interface.
"""

import atexit
import contextlib
import functools
import http.client
import http.server
import importlib.util
import json
import os
import re
import socket
import struct
import sys
import threading
import urllib.parse
from unittest import mock

from tests.helpers import FolderTest
from tests.processes import Process

BUCKET = "trm-bucket"


@functools.cache
def emulator_port():
    """Port of the emulator, one for the whole test process."""
    command = [sys.executable, "tests/programs/gcs_emulator.py", BUCKET]
    process = Process(command, feed=True, stderr=None)
    atexit.register(process.end)
    return int(process.line())


class Fault:
    """What happens to the next `times` requests of `method` whose path and query match `path`.

    kind: "status" (the answer is the status `value`), "cut_upload" (the connection ends after
    `value` bytes of the body), "cut_answer" (it ends after `value` bytes of the answer's body, when
    the server has done what was asked), "corrupt" (one byte of the answer's body is wrong),
    "replace" (in the answer's body, `value`: old and new), "hold" (the request waits until the
    threading.Event `value` is set).
    """

    def __init__(self, kind, value=None, times=1, method="", path="", message=""):
        self.kind, self.value, self.times, self.method, self.path, self.message = (
            kind,
            value,
            times,
            method,
            path,
            message,
        )
        self.met = threading.Event()  # set when a request has met it

    def meets(self, method, path):
        return self.times > 0 and self.method in ("", method) and re.search(self.path, path)


class Proxy:
    """Forwards requests from its port, `port`, to the emulator.

    requests: (method, path) of all that it has received.
    """

    def __init__(self):
        emulator_port()  # now: two requests at once would start two
        self.requests, self.faults, self.lock, self.server = [], [], threading.Lock(), None
        self.conditions = threading.Lock()  # a precondition is compared and acted on in one go
        self._bind(0)
        self.port = self.socket.getsockname()[1]
        self.accept()

    def _bind(self, port):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))

    def fail(self, kind, value=None, **how):
        fault = Fault(kind, value, **how)
        self.faults.append(fault)
        return fault

    def accept(self):
        """Take connections (again)."""
        self.socket.listen(64)
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", self.port), functools.partial(Handler, self), bind_and_activate=False
        )
        self.server.socket.close()
        self.server.socket, self.server.server_name, self.server.server_port = (
            self.socket,
            "127.0.0.1",
            self.port,
        )
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def refuse(self):
        """Refuse connections; the port stays ours: it is bound, and nobody listens."""
        self.close()
        self._bind(self.port)

    def close(self):
        if self.server:
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()
            self.server = None
        self.socket.close()

    def count(self, method="", path=""):
        """Requests taken so far, of this method and with this in path and query."""
        return sum(method in ("", m) and bool(re.search(path, p)) for m, p in self.requests)


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, proxy, *args):
        self.proxy = proxy
        super().__init__(*args)

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle_one_request()

    def log_message(self, *args):
        pass

    def serve(self):
        proxy = self.proxy
        with proxy.lock:
            proxy.requests.append((self.command, self.path))
            fault = next((f for f in proxy.faults if f.meets(self.command, self.path)), None)
            if fault:
                fault.times -= 1
        kind = fault and fault.kind
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "cut_upload":
            self.rfile.read(min(fault.value, length))
            return self.cut(fault)
        body = self.rfile.read(length)
        if kind == "hold":
            fault.met.set()
            fault.value.wait(30)
        if kind == "status":
            status, headers = fault.value, [("Content-Type", "application/json")]
            answer = json.dumps(
                {"error": {"code": status, "message": fault.message, "errors": []}}
            ).encode()
        else:
            status, headers, answer = self.forward(body)
        if kind == "corrupt":
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        if kind == "replace":
            assert fault.value[0] in answer
            answer = answer.replace(*fault.value)
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if kind == "cut_answer":
            self.wfile.write(answer[: fault.value])
            return self.cut(fault)
        self.wfile.write(answer)
        if fault:
            fault.met.set()

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def cut(self, fault):
        """End the connection as a broken line does (reset), once what was sent has left."""
        self.wfile.flush()
        if fault.kind == "cut_upload":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        fault.met.set()

    def forward(self, body):
        url = urllib.parse.urlsplit(self.path)
        condition = urllib.parse.parse_qs(url.query).get("ifGenerationMatch")
        if condition is None:
            return self.upstream(self.command, self.path, body)
        with self.proxy.conditions:
            name = re.search(r"/o/(.+)$", url.path)
            if name:
                name = urllib.parse.unquote(name[1])
            else:
                # the object's metadata: the first part of a multipart upload, or the whole body
                # that begins a resumable one
                metadata = re.search(rb"\{.*?\"name\".*?\}(?=\r\n--|$)", body, re.DOTALL)[0]
                name = json.loads(metadata)["name"]
            status, _, answer = self.upstream(
                "GET", f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}"
            )
            generation = json.loads(answer)["generation"] if status == 200 else "0"
            if generation != condition[0]:
                return (
                    412,
                    [("Content-Type", "application/json")],
                    b'{"error": {"code": 412, "message": "conditionNotMet"}}',
                )
            return self.upstream(self.command, self.path, body)

    def upstream(self, method, path, body=b""):
        connection = http.client.HTTPConnection("127.0.0.1", emulator_port(), timeout=30)
        try:
            headers = {
                k: v
                for k, v in self.headers.items()
                if k.lower() not in ("content-length", "connection", "accept-encoding")
            }
            if method != self.command:
                headers = {}
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            kept = [
                (k, v)
                for k, v in response.getheaders()
                if k.lower() not in ("content-length", "server", "date", "connection")
            ]
            return response.status, kept, response.read()
        finally:
            connection.close()


class GCSTest(FolderTest):
    """A test with self.url, a gs:// folder of its own.

    STORAGE_EMULATOR_HOST is self.proxy, which stands in front of the emulator.
    """

    def setUp(self):
        super().setUp()
        for module, package in (
            ("google.cloud.storage", "google-cloud-storage"),
            ("gcp_storage_emulator", "gcp-storage-emulator"),
        ):
            with contextlib.suppress(ModuleNotFoundError):
                if importlib.util.find_spec(module):
                    continue
            self.skipTest(f"{package} is not installed: pip install {package}")
        self.proxy = Proxy()
        self.addCleanup(self.proxy.close)
        patch = mock.patch.dict(
            os.environ, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.proxy.port}"}
        )
        patch.start()
        self.addCleanup(patch.stop)
        self.url = f"gs://{BUCKET}/{self.id()}"
