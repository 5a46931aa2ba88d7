"""One interface to a local folder and to gs://bucket/prefix.

A name is a path within the folder, its parts separated by "/". What is written under a name appears
whole or not at all. google-cloud-storage is imported when a gs:// path is used, not before.
"""

import base64
import contextlib
import errno
import fcntl
import hashlib
import http.client
import io
import os
import re
import secrets
import shutil
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from utils import RunFailure, UserError

GCS_URL = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", re.DOTALL)


class StorageError(RunFailure, OSError):
    """The storage failed, or could not be reached, until the deadline. The same call may succeed
    later."""


class _Damaged(Exception):
    """An object was damaged on its way, or replaced while it was read: another attempt may
    succeed."""


def is_remote(url: str | Path) -> bool:
    """Whether `url` is a gs:// path. A malformed one counts: opening it says what is wrong."""
    return str(url).startswith("gs:")


def join(url: str | Path, *names: str | Path) -> str:
    """The path url/name/name as text, local or gs://."""
    if is_remote(url):
        return "/".join([str(url).rstrip("/"), *map(str, names)])
    return os.path.join(url, *names)


def open_folder(url: str | Path, deadline: float = 120.0) -> "LocalFolder | GCSFolder":
    """The folder at `url`, which need not exist. Several threads may use it.

    deadline: for GCS only, in seconds: for so long an operation that fails is tried again.
    Raises UserError for a malformed gs:// path, if google-cloud-storage is not installed, if there
    are no credentials, and if a file is where a folder should be.
    """
    if is_remote(url):
        return GCSFolder(str(url), deadline)
    for path in (Path(url), *Path(url).parents):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(
                f"{url}: {path} is no folder, and one must be there: move it away, or name "
                "another place (of runs: logging.output_dir)"
            )
    return LocalFolder(url)


def checked_name(name: str, where: str) -> str:
    """Return `name` if it is a path that stays within its folder, otherwise raise UserError.

    where: what the message calls the folder.
    """
    parts = set(name.split("/"))
    if name.startswith("/") or "\\" in name or "\0" in name or parts & {"", ".", ".."}:
        raise UserError(
            f"{where}: the name {name!r} could lead out of the folder: names are relative, with "
            "no empty part, `.`, `..` or backslash: rename it"
        )
    return name


def sync_folder(folder: str | Path) -> None:
    """fsync a folder, so that files made, renamed or deleted in it stay so after a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """$TRM_CACHE, or ~/.cache/trm: for downloads, and for runs whose own folder is in a bucket."""
    return Path(os.environ.get("TRM_CACHE") or "~/.cache/trm").expanduser()


def digest(data: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write and read, which becomes `path` after the block, or disappears if the block
    raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and target.samefile(source)):
        with open(source, "rb") as content, _whole(target) as file:
            shutil.copyfileobj(content, file)


class Folder(ABC):
    """What a LocalFolder and a GCSFolder can do. `url` is where the folder is."""

    url: str

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, int]:
        """{name: size in bytes} of all files, at any depth, whose name begins with `prefix`."""

    @abstractmethod
    def read_version(self, name: str) -> tuple[bytes, str]:
        """(content, token). The token identifies this version, for replace_if and delete.

        Raises FileNotFoundError if there is no such file.
        """

    def read(self, name: str) -> bytes:
        """The content. Raises FileNotFoundError if there is no such file."""
        return self.read_version(name)[0]

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write bytes, whatever was there before."""

    @abstractmethod
    def replace_if(self, name: str, data: bytes, token: str | None) -> str | None:
        """Write bytes only over the version of `token`, or if it is None, only if there is no file.

        Returns the token of the new version, or None if another version is there. Of several that
        try at the same time, one succeeds.
        """

    @abstractmethod
    def put(self, local_path: str | Path, name: str) -> None:
        """Copy a local file into the folder."""

    @abstractmethod
    def take(self, local_path: str | Path, name: str) -> None:
        """Move a local file into the folder.

        For a LocalFolder both must be on the same file system; otherwise it raises OSError.
        """

    @abstractmethod
    def get(self, name: str, local_path: str | Path) -> None:
        """Copy a file of the folder to a local file, which is synced before it has its name.

        Raises FileNotFoundError if there is no such file.
        """

    @abstractmethod
    def delete(self, name: str, token: str | None = None) -> None:
        """Delete a file; with a token, only that version. A missing file is no error."""


class LocalFolder(Folder):
    """A folder of this machine. Its methods also raise plain OSErrors."""

    def __init__(self, path: str | Path):
        self.path, self.url = Path(path), str(path)

    def _path(self, name: str) -> Path:
        return self.path / checked_name(name, self.url)

    def list(self, prefix: str = "") -> dict[str, int]:
        def failed(error: OSError) -> None:
            # the folder does not exist yet, or was deleted a moment ago
            if not isinstance(error, FileNotFoundError):
                raise error

        found = {}
        for folder, _, files in os.walk(self.path, onerror=failed):
            for file in files:
                path = Path(folder, file)
                name = path.relative_to(self.path).as_posix()
                hidden = re.fullmatch(r".*\.tmp|\..*\.lock", file, re.DOTALL)
                if name.startswith(prefix) and not hidden:
                    with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                        found[name] = path.stat().st_size
        return dict(sorted(found.items()))

    def read_version(self, name: str) -> tuple[bytes, str]:
        with open(self._path(name), "rb") as file:
            data = file.read()
            # With the time, because the content alone does not tell whether the file was deleted
            # and written again meanwhile (as a lock that is released and taken).
            return data, f"{os.fstat(file.fileno()).st_mtime_ns}-{digest(data)}"

    def write(self, name: str, data: bytes) -> None:
        with _whole(self._path(name)) as file:
            file.write(data)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[Path]:
        """Let nobody else compare or replace this file meanwhile. The lock file stays: if it were
        deleted, two could hold a lock."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path

    def _token(self, name: str) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return self.read_version(name)[1]
        return None

    def replace_if(self, name: str, data: bytes, token: str | None) -> str | None:
        with self._locked(name):
            if self._token(name) != token:
                return None
            self.write(name, data)
            return self._token(name)

    def put(self, local_path: str | Path, name: str) -> None:
        _copy(Path(local_path), self._path(name))

    def take(self, local_path: str | Path, name: str) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(local_path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(local_path, path)
        sync_folder(path.parent)

    def get(self, name: str, local_path: str | Path) -> None:
        _copy(self._path(name), Path(local_path))

    def delete(self, name: str, token: str | None = None) -> None:
        if token is None:
            self._path(name).unlink(missing_ok=True)
            return
        with self._locked(name) as path:
            if self._token(name) == token:
                path.unlink()


# --------------------------------------------------------------------------------------------------
# Google Cloud Storage
# --------------------------------------------------------------------------------------------------
def _google(url: str) -> types.SimpleNamespace:
    """What is used of google-cloud-storage. Raises UserError if it is not installed."""
    try:
        import google_crc32c
        import requests
        import urllib3
        from google.api_core import exceptions as api
        from google.api_core.retry import Retry
        from google.auth import exceptions as auth
        from google.cloud.storage import Client
    except ImportError as error:
        raise UserError(
            f"{url}: gs:// paths need the package google-cloud-storage ({error}): "
            "pip install google-cloud-storage, or give a local path"
        ) from None
    http_error = urllib3.exceptions.HTTPError
    network = (requests.RequestException, http_error, ConnectionError, auth.TransportError)
    return types.SimpleNamespace(
        Checksum=google_crc32c.Checksum,
        api=api,
        auth=auth,
        Retry=Retry,
        Client=Client,
        network=network,
    )


class ObjectVersion(NamedTuple):
    """One version of an object. The library's Blob would not do: a download overwrites its fields
    with the headers of the answer."""

    name: str
    size: int
    generation: int
    crc32c: str

    @classmethod
    def of(cls, blob: Any) -> "ObjectVersion":
        """The version that a Blob of the library describes."""
        return cls(blob.name, blob.size, blob.generation, blob.crc32c)


class GCSFolder(Folder):
    """The objects under gs://bucket/prefix, with the credentials and the endpoint that the
    environment gives (STORAGE_EMULATOR_HOST).

    Every method may raise StorageError (unreachable or failing until the deadline) and UserError
    (no permission, no such bucket, no credentials, a name that leads out of the folder). Each
    operation has one deadline and starts again when it fails. An attempt that makes progress is not
    interrupted by the deadline; one that hears nothing for `timeout` seconds is.
    """

    def __init__(self, url: str, deadline: float = 120.0):
        match = GCS_URL.fullmatch(url)
        if not match:
            raise UserError(
                f"{url!r} is not a Cloud Storage path: write gs://bucket/folder, the bucket's name "
                "in small letters, digits, - _ ."
            )
        prefix = (match[2] or "").rstrip("/")
        self.url = f"gs://{match[1]}" + (f"/{checked_name(prefix, url)}" if prefix else "")
        self.prefix = prefix and f"{prefix}/"
        self.deadline, self.timeout = deadline, min(60.0, deadline)
        self.google = _google(self.url)
        # The library's tracing, though off, would let a thread ask for the bucket's metadata, which
        # needs another permission.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        self.client = self._call("", lambda: self.google.Client(project=None))
        self.bucket = self.client.bucket(match[1])
        # no retries in the library: _call repeats whole operations, and then checks them whole
        self.options = {"timeout": self.timeout, "retry": None}

    def _call(self, name: str, attempt: Callable[[], Any]) -> Any:
        """The result of `attempt()`, which is called again, with exponential backoff, while its
        error is transient. name: of the object, for messages ("": the folder).

        Raises StorageError or UserError, as the class says. A FileNotFoundError passes through.
        """
        google, what = self.google, join(self.url, name) if name else self.url
        retry = google.Retry(
            self._is_transient, initial=0.5, maximum=20.0, multiplier=2.0, timeout=self.deadline
        )
        # "from None": the library's own messages hold the URLs of requests, and the URL of an
        # upload is a credential for that upload
        try:
            return retry(attempt)()
        except google.api.RetryError as error:
            raise StorageError(
                f"{what}: no success within {self.deadline:g} s, last: {self._cause(error.cause)}"
            ) from None
        except google.api.NotFound:
            raise UserError(
                f"{what}: there is no bucket {self.bucket.name!r}: make it, or correct the path"
            ) from None
        except google.api.Forbidden as error:
            found = re.search(r"storage\.(?:objects|buckets)\.[a-z]+", error.message)
            permission = f" ({found[0]})" if found else ""
            raise UserError(
                f"{what}: permission denied{permission}: give the account this runs as the role "
                "Storage Object Admin on the bucket, or use a folder it may write"
            ) from None
        except (google.api.Unauthorized, google.auth.GoogleAuthError) as error:
            raise UserError(
                f"{what}: there are no valid Google credentials here ({type(error).__name__}): "
                "give the TPU VM a service account with access to the bucket, or run gcloud auth "
                "application-default login"
            ) from None
        except google.api.GoogleAPIError as error:
            raise StorageError(
                f"{what}: Cloud Storage refused the request: {self._cause(error)}"
            ) from None

    def _is_transient(self, error: Exception) -> bool:
        google = self.google
        if isinstance(error, google.api.GoogleAPICallError):
            # 410: the session of an upload has ended
            return error.code in (408, 410, 429) or (error.code or 0) >= 500
        if isinstance(error, google.auth.RefreshError):
            # also what the library raises when the VM's metadata server does not answer
            return error.retryable or isinstance(error.__cause__, google.auth.TransportError)
        return isinstance(error, (_Damaged, *google.network))

    def _cause(self, error: Any) -> str:
        """What went wrong, for messages, without URLs, headers or text from the server: these may
        hold credentials."""
        if isinstance(error, _Damaged):
            return str(error)
        if isinstance(error, self.google.api.GoogleAPICallError):
            return f"HTTP {int(error.code)} {http.client.responses.get(error.code, '')}".rstrip()
        text = type(error).__name__
        while error is not None:
            text = error.strerror if isinstance(error, OSError) and error.strerror else text
            error = error.__cause__ or error.__context__
        return text

    def _blob(self, name: str) -> Any:
        return self.bucket.blob(self.prefix + checked_name(name, self.url))

    def _measured(self, file: BinaryIO) -> tuple[int, str]:
        """(bytes, crc32c as GCS writes it) of a whole file."""
        file.seek(0)
        size, checksum = 0, self.google.Checksum()
        while block := file.read(1 << 20):
            size += len(block)
            checksum.update(block)
        return size, base64.b64encode(checksum.digest()).decode()

    def list(self, prefix: str = "") -> dict[str, int]:
        return {name: version.size for name, version in self.versions(prefix).items()}

    def versions(self, prefix: str = "") -> dict[str, ObjectVersion]:
        """{name: the version that is stored now} of all objects whose name begins with `prefix`.
        `get_version` takes one of them."""

        def attempt() -> dict[str, ObjectVersion]:
            blobs = self.client.list_blobs(
                self.bucket,
                prefix=self.prefix + prefix,
                **self.options,
                fields="items(name,size,generation,crc32c),nextPageToken",
            )
            # consoles make empty objects that end with "/" to show folders
            return {
                blob.name[len(self.prefix) :]: ObjectVersion.of(blob)
                for blob in blobs
                if not blob.name.endswith("/")
            }

        return self._call(prefix, attempt)

    def _stat(self, name: str) -> ObjectVersion:
        blob = self.bucket.get_blob(self._blob(name).name, **self.options)
        if blob is None:
            self._check_bucket()
            raise FileNotFoundError(errno.ENOENT, "there is no such object", join(self.url, name))
        return ObjectVersion.of(blob)

    def _check_bucket(self) -> None:
        """Raises the library's NotFound if the bucket does not exist.

        The answer NotFound for an object does not tell whether the object or the bucket is missing.
        This costs one request.
        """
        for _ in self.client.list_blobs(
            self.bucket, prefix=self.prefix, max_results=1, **self.options
        ):
            pass

    def _fetch(self, version: ObjectVersion, file: BinaryIO) -> None:
        """One attempt to bring exactly this version of an object into `file`.

        It is checked here: the library does not check a download that it has resumed.
        """
        file.seek(0)
        file.truncate()
        try:
            # raw_download: the bytes as they are stored, since size and checksum are of these
            self.bucket.blob(version.name, generation=version.generation).download_to_file(
                file, raw_download=True, checksum=None, **self.options
            )
        except self.google.api.NotFound:
            raise _Damaged("it was replaced while it was read") from None
        if self._measured(file) != (version.size, version.crc32c):
            raise _Damaged("what arrived is not what is stored (size or checksum)")

    def read_version(self, name: str) -> tuple[bytes, str]:
        def attempt() -> tuple[bytes, str]:
            version, file = self._stat(name), io.BytesIO()
            self._fetch(version, file)
            return file.getvalue(), str(version.generation)

        return self._call(name, attempt)

    def get(self, name: str, local_path: str | Path) -> None:
        self._call(name, lambda: self._get(self._stat(name), local_path))

    def get_version(self, name: str, version: ObjectVersion, local_path: str | Path) -> None:
        """As `get`, but exactly the version that `versions` returned. Raises StorageError if it has
        been replaced since then."""
        self._call(name, lambda: self._get(version, local_path))

    def _get(self, version: ObjectVersion, local_path: str | Path) -> None:
        with _whole(local_path) as file:
            self._fetch(version, file)

    def write(self, name: str, data: bytes) -> None:
        self._upload(name, io.BytesIO(data))

    def put(self, local_path: str | Path, name: str) -> None:
        """Copy a local file into the folder. The server refuses it if its checksum is wrong. If the
        file grows meanwhile, only what was there at the beginning is copied."""
        with open(local_path, "rb") as file:
            self._upload(name, file)

    def take(self, local_path: str | Path, name: str) -> None:
        self.put(local_path, name)
        os.unlink(local_path)

    def replace_if(self, name: str, data: bytes, token: str | None) -> str | None:
        return self._upload(name, io.BytesIO(data), int(token or 0))

    def _upload(self, name: str, file: BinaryIO, generation: int | None = None) -> str | None:
        """Upload a file; returns the token of the new version.

        generation: if it is given, upload only if that version is there now (0: only if there is no
        object). Returns None if another one is there.
        """
        (size, crc32c), write_id, api = self._measured(file), secrets.token_hex(16), self.google.api

        def attempt() -> str | None:
            blob = self._blob(name)
            blob.crc32c, blob.metadata = crc32c, {"write_id": write_id}
            try:
                blob.upload_from_file(
                    file,
                    rewind=True,
                    size=size,
                    checksum=None,
                    if_generation_match=generation,
                    **self.options,
                )
            except api.PreconditionFailed:
                # if the answer to an earlier attempt was lost, the object that is there is ours
                blob = self.bucket.get_blob(blob.name, **self.options)
                if blob is None or (blob.metadata or {}).get("write_id") != write_id:
                    return None
            except api.NotFound:
                self._check_bucket()
                raise _Damaged("the server no longer knew the upload") from None
            if (blob.size, blob.crc32c) != (size, crc32c):
                raise _Damaged("what is stored is not what was sent (size or checksum)")
            return str(blob.generation)

        return self._call(name, attempt)

    def delete(self, name: str, token: str | None = None) -> None:
        def attempt() -> None:
            try:
                self._blob(name).delete(if_generation_match=token and int(token), **self.options)
            except self.google.api.NotFound:
                self._check_bucket()
            except self.google.api.PreconditionFailed:
                pass

        self._call(name, attempt)
