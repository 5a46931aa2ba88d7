"""A network for tests of an installation: package indexes, and a Python, behind a proxy that speaks
for every host."""

import base64
import hashlib
import html
import importlib.metadata
import io
import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "site-packages",
    "ensurepip",
    "__pycache__",
}


def find_python(version):
    """A Python of this machine of that version, or None: not through a shim that another version
    may stand behind."""
    name = f"python{version}"
    for path in (
        sys.executable,
        shutil.which(name),
        *sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/{name}")),
    ):
        code = (
            "import os, sys; print('%d.%d' % sys.version_info[:2]); "
            "print(os.path.realpath(sys._base_executable))"
        )
        if (
            path
            and (
                done := subprocess.run([path, "-c", code], capture_output=True, text=True)
            ).returncode
            == 0
        ):
            found, real = done.stdout.splitlines()
            if found == version:
                return Path(real)
    return None


def packed_python(python):
    """A tar.gz of an interpreter and its standard library as uv downloads it: under python/, to be
    unpacked anywhere."""
    base, name = python.parent.parent, python.name

    def chosen(member):
        last = os.path.basename(member.name)
        return (
            None
            if last in LEFT_OUT or last.startswith("config-") or last.endswith(".a")
            else member
        )

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        archive.add(python, f"python/bin/{name}")
        archive.add(base / "lib" / name, f"python/lib/{name}", filter=chosen)
    return packed.getvalue()


def wheel(name, version, modules, requires=(), requires_python=">=3.8", code=""):
    """(file name, bytes) of a wheel with these modules, each with that code."""
    files = {f"{module.replace('.', '/')}/__init__.py": code.encode() for module in modules}
    metadata = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: "
        f"{requires_python}",
        *(f"Requires-Dist: {other}" for other in requires),
    ]
    return packed_wheel(name, version, "py3-none-any", files, "\n".join(metadata) + "\n")


def packed_wheel(name, version, tag, files, metadata):
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        **files,
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: "
        f"true\nTag: {tag}\n".encode(),
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for path, data in files.items()
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, data in {
            **files,
            f"{stem}.dist-info/RECORD": (record + f"{stem}.dist-info/RECORD,,\n").encode(),
        }.items():
            info = zipfile.ZipInfo(path)
            info.external_attr = 0o100755 << 16
            archive.writestr(info, data)
    return f"{stem}-{tag}.whl", packed.getvalue()


def installed_wheel(name):
    """(file name, bytes) of a wheel made of what is installed here under that name."""
    found = importlib.metadata.distribution(name)
    files = {}
    for path in found.files:
        data, parts = Path(found.locate_file(path)), path.parts
        if parts[0] == "..":
            files[f"{name}-{found.version}.data/scripts/{parts[-1]}"] = data.read_bytes()
        elif not parts[0].endswith(".dist-info") and path.suffix != ".pyc":
            files[path.as_posix()] = data.read_bytes()
    return packed_wheel(name, found.version, "py3-none-any", files, found.read_text("METADATA"))


class Network:
    """files: {name: bytes}, each at the path /files/NAME of all hosts; indexes: {path: names of the
    wheels that it lists}; asked: the (host, path) of all requests; sent: the names of what the
    other side did not have. A file of `stuck` comes by half, and the rest once `going` is set. ca:
    the certificate to trust; url: the proxy's."""

    def __init__(self, test, folder):
        self.files, self.indexes, self.asked, self.sent, self.stuck, self.folder = (
            {},
            {},
            [],
            [],
            set(),
            folder,
        )
        self.going, self.contexts, self.lock = threading.Event(), {}, threading.Lock()
        (folder / "openssl.cnf").write_text("[req]\ndistinguished_name = name\n[name]\n")
        self.ca = self.certificate("ca", "basicConstraints=critical,CA:TRUE")
        network = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, host = "HTTP/1.1", None

            def do_CONNECT(self):
                self.host = self.path.partition(":")[0]
                self.send_response(200)
                self.end_headers()
                self.connection = network.context(self.host).wrap_socket(
                    self.connection, server_side=True
                )
                self.rfile, self.wfile = (
                    self.connection.makefile("rb"),
                    self.connection.makefile("wb", 0),
                )
                self.close_connection = False

            def do_GET(self):
                network.asked.append((self.host, self.path))
                body = network.answer(self.path)
                tag = f'"{hashlib.sha256(body or b"").hexdigest()}"'
                if body is not None and self.headers["If-None-Match"] == tag:
                    self.send_response(304)
                    self.send_header("ETag", tag)
                    self.end_headers()
                    return
                network.sent.append(self.path.rpartition("/")[2])
                self.send_response(404 if body is None else 200)
                self.send_header("ETag", tag)
                self.send_header(
                    "Content-Type",
                    "text/html" if self.path.endswith("/") else "application/octet-stream",
                )
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if self.path.rpartition("/")[2] in network.stuck:
                    self.wfile.write(body[: len(body) // 2])
                    network.going.wait(300)
                    body = body[len(body) // 2 :]
                self.wfile.write(body or b"")

            def finish(self):
                super().finish()
                self.connection.close()

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # a client that was killed

        server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for end in (server.server_close, server.shutdown, self.going.set):
            test.addCleanup(end)

    def certificate(self, name, *extensions, signed_by=()):
        words = [
            "openssl",
            "req",
            "-x509",
            "-config",
            self.folder / "openssl.cnf",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
            "-keyout",
            self.folder / f"{name}.key",
            "-out",
            self.folder / f"{name}.pem",
            *signed_by,
        ]
        subprocess.run(
            [*words, *(word for extension in extensions for word in ("-addext", extension))],
            check=True,
            capture_output=True,
        )
        return self.folder / f"{name}.pem"

    def context(self, host):
        with self.lock:
            if host not in self.contexts:
                path = self.certificate(
                    host,
                    f"subjectAltName=DNS:{host}",
                    "basicConstraints=critical,CA:FALSE",
                    signed_by=("-CA", self.ca, "-CAkey", self.folder / "ca.key"),
                )
                self.contexts[host] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                self.contexts[host].load_cert_chain(path, self.folder / f"{host}.key")
            return self.contexts[host]

    def answer(self, path):
        if path.startswith("/files/"):
            name = path.removeprefix("/files/")
            return (
                metadata_of(self.files[name.removesuffix(".metadata")])
                if name.endswith(".metadata")
                else self.files.get(name)
            )
        index, _, name = path.rstrip("/").rpartition("/")
        wheels = [
            file
            for file in self.indexes.get(index, ())
            if file.partition("-")[0].lower().replace("_", "-") == name
        ]
        if not wheels:
            return None
        lines = [
            f'<a href="/files/{file}#sha256={hashlib.sha256(self.files[file]).hexdigest()}" '
            f'data-core-metadata="true" '
            f'data-requires-python="{html.escape(requires_python(self.files[file]))}">{file}</a>'
            for file in wheels
        ]
        return f"<!DOCTYPE html><html><body>{''.join(lines)}</body></html>".encode()

    def add(self, index, *wheels):
        """List wheels, each a (file name, bytes), in the index at this path."""
        self.files |= dict(wheels)
        self.indexes.setdefault(index, set()).update(name for name, _ in wheels)

    def add_python(self, python, packed, url):
        """List this interpreter, `packed`, at that host's URL for uv, and a newer one that is not
        there; the list's path."""
        version = subprocess.run(
            [python, "-c", "import platform; print(platform.python_version())"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        major, minor, patch = (int(part) for part in version.split("."))
        self.files["python.tar.gz"] = packed
        listed = {
            "name": "cpython",
            "arch": {"family": os.uname().machine, "variant": None},
            "os": "linux",
            "libc": "gnu",
            "major": major,
            "minor": minor,
            "patch": patch,
            "prerelease": "",
            "url": f"{url}/files/python.tar.gz",
            "sha256": hashlib.sha256(packed).hexdigest(),
            "variant": None,
            "build": None,
        }
        path = self.folder / "pythons.json"
        newer = {**listed, "minor": minor + 3, "url": f"{url}/files/newer.tar.gz"}
        end = f"{patch}-linux-{os.uname().machine}-gnu"
        pythons = {
            f"cpython-{each['major']}.{each['minor']}.{end}": each for each in (listed, newer)
        }
        path.write_text(json.dumps(pythons))
        return path


def metadata_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(
            next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        )


def requires_python(data):
    return next(
        (
            line.partition(": ")[2]
            for line in metadata_of(data).decode().splitlines()
            if line.startswith("Requires-Python")
        ),
        "",
    )
