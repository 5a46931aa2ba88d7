"""One interface to a local folder and to gs://bucket/prefix. google-cloud-storage is imported when a gs:// path is used.

A name is a path within the folder, parts separated by "/". Whatever is written under a name appears whole or not at all.
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
import typing
from pathlib import Path

from utils import RunFailure, UserError

GCS_URL = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", re.DOTALL)


class StorageError(RunFailure, OSError):
    """The storage could not be reached, or failed, until the deadline: the same call may succeed later."""


class _Spoilt(Exception):
    """An object was damaged on its way, or replaced while it was read: worth another attempt."""


def is_remote(url):
    """Whether `url` is a gs:// path (a malformed one too: opening it says what is wrong)."""
    return str(url).startswith("gs:")


def join(url, *names):
    """`url`/name/name as text, for both kinds of path."""
    return (
        "/".join([str(url).rstrip("/"), *map(str, names)])
        if is_remote(url)
        else os.path.join(url, *names)
    )


def open_folder(url, deadline=120.0):
    """The LocalFolder or GCSFolder at `url`; it need not exist. A folder may be used by several threads.

    deadline: seconds for which an operation on GCS is tried again while what fails may pass.
    Raises UserError for a malformed gs:// path, without google-cloud-storage, where there are no credentials, and where a file
    is in the way.
    """
    if is_remote(url):
        return GCSFolder(str(url), deadline)
    for path in (Path(url), *Path(url).parents):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(
                f"{url}: {path} is no folder, and one must be there: move it away, or name another place (of runs: logging.output_dir)"
            )
    return LocalFolder(url)


def checked_name(name, where):
    """`name`, where it is a path that stays within its folder; UserError, naming the folder `where`, otherwise."""
    if (
        name.startswith("/")
        or "\\" in name
        or "\0" in name
        or not {"", ".", ".."}.isdisjoint(name.split("/"))
    ):
        raise UserError(
            f"{where}: the name {name!r} could lead out of the folder: names are relative, with no empty part, "
            "`.`, `..` or backslash: rename it"
        )
    return name


def sync_folder(folder):
    """Bring a folder's entries (files made, renamed, deleted) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _whole(path):
    """A file to write and read, that appears as `path` after the block, or not at all if the block raises."""
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


def _copy(source, target):
    if not (target.exists() and target.samefile(source)):
        with open(source, "rb") as content, _whole(target) as file:
            shutil.copyfileobj(content, file)


class _Folder:
    def read(self, name):
        """The content, bytes. Raises FileNotFoundError where there is none."""
        return self.read_version(name)[0]

    def create(self, name, data):
        """Write bytes only if there is nothing: the version's token, or None where somebody was first."""
        return self.replace_if(name, data, None)


class LocalFolder(_Folder):
    """A folder of this machine. The methods are those of GCSFolder, which says what they do; they raise plain OSErrors."""

    def __init__(self, path):
        self.path, self.url = Path(path), str(path)

    def _path(self, name):
        return self.path / checked_name(name, self.url)

    def list(self, prefix=""):
        def failed(error):
            if not isinstance(error, FileNotFoundError):  # no folder yet, or one deleted meanwhile
                raise error

        found = {}
        for folder, _, files in os.walk(self.path, onerror=failed):
            for path in (
                Path(folder, file)
                for file in files
                if not re.fullmatch(r".*\.tmp|\..*\.lock", file, re.DOTALL)
            ):
                if (name := path.relative_to(self.path).as_posix()).startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                        found[name] = path.stat().st_size
        return dict(sorted(found.items()))

    def read_version(self, name):
        with open(self._path(name), "rb") as file:
            data = file.read()
            # content alone would not tell a lock that was released and taken again from one that was kept
            return data, f"{os.fstat(file.fileno()).st_mtime_ns}-{digest(data)}"

    def write(self, name, data):
        with _whole(self._path(name)) as file:
            file.write(data)

    @contextlib.contextmanager
    def _locked(self, name):
        """Between comparing and replacing, nobody else may do either. The lock file stays: deleting it would let two in."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path

    def _token(self, name):
        with contextlib.suppress(FileNotFoundError):
            return self.read_version(name)[1]

    def replace_if(self, name, data, token):
        with self._locked(name):
            if self._token(name) != token:
                return None
            self.write(name, data)
            return self._token(name)

    def put(self, local_path, name):
        _copy(Path(local_path), self._path(name))

    def take(self, local_path, name):
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(local_path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(local_path, path)
        sync_folder(path.parent)

    def get(self, name, local_path):
        _copy(self._path(name), Path(local_path))

    def delete(self, name, token=None):
        if token is None:
            return self._path(name).unlink(missing_ok=True)
        with self._locked(name) as path:
            if self._token(name) == token:
                path.unlink()


# ---------------------------------------------------------------------------------------------------------
# Google Cloud Storage
# ---------------------------------------------------------------------------------------------------------
def _google(url):
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
    return types.SimpleNamespace(
        Checksum=google_crc32c.Checksum,
        api=api,
        auth=auth,
        Retry=Retry,
        Client=Client,
        network=(
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            ConnectionError,
            auth.TransportError,
        ),
    )


class _Stored(typing.NamedTuple):
    """One version of an object. Not the library's Blob: a download overwrites what that says with the answer's headers."""

    name: str
    size: int
    generation: int
    crc32c: str

    @classmethod
    def of(cls, blob):
        return cls(blob.name, blob.size, blob.generation, blob.crc32c)


class GCSFolder(_Folder):
    """The objects under gs://bucket/prefix, with the credentials and the endpoint of the environment (STORAGE_EMULATOR_HOST).

    Every method may raise StorageError (unreachable or failing until the deadline) and UserError (no permission, no
    such bucket, no credentials, a name that leads out of the folder). Each operation has one deadline, and starts over
    when it fails: an attempt that gets on is not cut short by it, one that hears nothing for `timeout` seconds is.
    """

    def __init__(self, url, deadline=120.0):
        match = GCS_URL.fullmatch(url)
        if not match:
            raise UserError(
                f"{url!r} is not a Cloud Storage path: write gs://bucket/folder, the bucket's name in small letters, digits, - _ ."
            )
        prefix = (match[2] or "").rstrip("/")
        self.url = f"gs://{match[1]}" + (f"/{checked_name(prefix, url)}" if prefix else "")
        self.prefix = prefix and f"{prefix}/"
        self.deadline, self.timeout = deadline, min(60.0, deadline)
        self.google = _google(self.url)
        # the library's tracing, though off, would have a thread ask for the bucket's metadata, which needs a permission of its own
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        self.client = self._call("", lambda: self.google.Client(project=None))
        self.bucket = self.client.bucket(match[1])
        self.options = {
            "timeout": self.timeout,
            "retry": None,
        }  # _call retries whole operations, and then checks them whole

    def _call(self, name, attempt):
        """The result of `attempt()`, called again with exponential backoff while what it raises may pass."""
        google, what = self.google, join(self.url, name) if name else self.url
        retry = google.Retry(
            self._may_pass, initial=0.5, maximum=20.0, multiplier=2.0, timeout=self.deadline
        )
        # "from None": the library's own messages hold request URLs, and an upload's URL is a credential for that upload
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
            permission = re.search(r"storage\.(?:objects|buckets)\.[a-z]+", error.message)
            raise UserError(
                f"{what}: permission denied"
                + (f" ({permission[0]})" if permission else "")
                + ": give the account this runs as "
                "the role Storage Object Admin on the bucket, or use a folder it may write"
            ) from None
        except (google.api.Unauthorized, google.auth.GoogleAuthError) as error:
            raise UserError(
                f"{what}: there are no valid Google credentials here ({type(error).__name__}): give the TPU VM a service "
                "account with access to the bucket, or run gcloud auth application-default login"
            ) from None
        except google.api.GoogleAPIError as error:
            raise StorageError(
                f"{what}: Cloud Storage refused the request: {self._cause(error)}"
            ) from None

    def _may_pass(self, error):
        google = self.google
        if isinstance(error, google.api.GoogleAPICallError):
            return (
                error.code in (408, 410, 429) or (error.code or 0) >= 500
            )  # 410: an upload's session has ended
        if isinstance(
            error, google.auth.RefreshError
        ):  # the VM's metadata server out of reach comes as one, too
            return error.retryable or isinstance(error.__cause__, google.auth.TransportError)
        return isinstance(error, (_Spoilt, *google.network))

    def _cause(self, error):
        """For messages: no URL, no header, nothing that a server chose to repeat."""
        if isinstance(error, _Spoilt):
            return str(error)
        if isinstance(error, self.google.api.GoogleAPICallError):
            return f"HTTP {int(error.code)} {http.client.responses.get(error.code, '')}".rstrip()
        text = type(error).__name__
        while error is not None:
            text = error.strerror if isinstance(error, OSError) and error.strerror else text
            error = error.__cause__ or error.__context__
        return text

    def _blob(self, name):
        return self.bucket.blob(self.prefix + checked_name(name, self.url))

    def _measured(self, file):
        """(bytes, crc32c in GCS's spelling) of a whole file."""
        file.seek(0)
        size, checksum = 0, self.google.Checksum()
        while block := file.read(1 << 20):
            size += len(block)
            checksum.update(block)
        return size, base64.b64encode(checksum.digest()).decode()

    def list(self, prefix=""):
        """{name: size in bytes} of everything in the folder, at any depth, whose name begins with `prefix`."""
        return {name: stored.size for name, stored in self.versions(prefix).items()}

    def versions(self, prefix=""):
        """{name: what identifies the version that is stored now}, for get_version."""

        def attempt():
            blobs = self.client.list_blobs(
                self.bucket,
                prefix=self.prefix + prefix,
                **self.options,
                fields="items(name,size,generation,crc32c),nextPageToken",
            )
            # consoles make empty objects that end with "/" to show folders
            return {
                blob.name[len(self.prefix) :]: _Stored.of(blob)
                for blob in blobs
                if not blob.name.endswith("/")
            }

        return self._call(prefix, attempt)

    def _stat(self, name):
        blob = self.bucket.get_blob(self._blob(name).name, **self.options)
        if blob is None:
            self._check_bucket()
            raise FileNotFoundError(errno.ENOENT, "there is no such object", join(self.url, name))
        return _Stored.of(blob)

    def _check_bucket(self):
        """Raises NotFound where the bucket is what is missing: the answers for an object do not tell. Costs a request."""
        list(self.client.list_blobs(self.bucket, prefix=self.prefix, max_results=1, **self.options))

    def _fetch(self, stored, file):
        """One attempt to bring exactly this version of an object into `file`, verified against its metadata: the library
        checks neither a download that it resumed nor, here, any other."""
        file.seek(0)
        file.truncate()
        try:
            # raw: as stored, which is what its size and checksum are of
            self.bucket.blob(stored.name, generation=stored.generation).download_to_file(
                file, raw_download=True, checksum=None, **self.options
            )
        except self.google.api.NotFound:
            raise _Spoilt("it was replaced while it was read") from None
        if self._measured(file) != (stored.size, stored.crc32c):
            raise _Spoilt("what arrived is not what is stored (size or checksum)")

    def read_version(self, name):
        """(content, token): the token stands for this version, in replace_if and delete. Raises FileNotFoundError."""

        def attempt():
            stored, file = self._stat(name), io.BytesIO()
            self._fetch(stored, file)
            return file.getvalue(), str(stored.generation)

        return self._call(name, attempt)

    def get(self, name, local_path):
        """Bring an object into a local file: verified and synced before it has that name. Raises FileNotFoundError."""
        self._call(name, lambda: self._get(self._stat(name), local_path))

    def get_version(self, name, version, local_path):
        """As `get`, of a version that `versions` told of; StorageError if it has been replaced."""
        self._call(name, lambda: self._get(version, local_path))

    def _get(self, stored, local_path):
        with _whole(local_path) as file:
            self._fetch(stored, file)

    def write(self, name, data):
        """Write bytes, whoever wrote there before."""
        self._upload(name, io.BytesIO(data))

    def put(self, local_path, name):
        """Upload a local file: the server takes it only if its checksum is the file's. Of a file that grows, what it is now."""
        with open(local_path, "rb") as file:
            self._upload(name, file)

    def take(self, local_path, name):
        """As `put`, and the local file is gone afterwards."""
        self.put(local_path, name)
        os.unlink(local_path)

    def replace_if(self, name, data, token):
        """Write bytes only over the version of `token` (None: only if there is nothing). Returns the new version's token,
        or None where the version is another: of several that try at once, one succeeds."""
        return self._upload(name, io.BytesIO(data), int(token or 0))

    def _upload(self, name, file, generation=None):
        (size, crc32c), write_id, api = self._measured(file), secrets.token_hex(16), self.google.api

        def attempt():
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
                # the answer to an earlier attempt may have been lost: then what is there is ours
                blob = self.bucket.get_blob(blob.name, **self.options)
                if blob is None or (blob.metadata or {}).get("write_id") != write_id:
                    return None
            except api.NotFound:
                self._check_bucket()
                raise _Spoilt("the server no longer knew the upload") from None
            if (blob.size, blob.crc32c) != (size, crc32c):
                raise _Spoilt("what is stored is not what was sent (size or checksum)")
            return str(blob.generation)

        return self._call(name, attempt)

    def delete(self, name, token=None):
        """Delete, with a token only that version; nothing there, or another version, is no error."""

        def attempt():
            try:
                self._blob(name).delete(if_generation_match=token and int(token), **self.options)
            except self.google.api.NotFound:
                self._check_bucket()
            except self.google.api.PreconditionFailed:
                pass

        self._call(name, attempt)


def cache_folder():
    """$TRM_CACHE, or ~/.cache/trm: for what is downloaded, and for runs whose own folder is in a bucket."""
    return Path(os.environ.get("TRM_CACHE") or "~/.cache/trm").expanduser()


def digest(data):
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()
