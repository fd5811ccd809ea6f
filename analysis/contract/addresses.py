"""Where results may lie besides a local folder: any URI that pyarrow or fsspec opens."""

import os
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    import pyarrow.fs

_S3_OPTIONS: Final = {"region", "scheme", "endpoint_override"}


def open_uri(uri: str) -> tuple["pyarrow.fs.FileSystem", str]:
    """File system and path of a URI.

    ``s3://bucket/folder?endpoint_override=HOST:PORT&scheme=http&region=R`` is any S3-compatible server; without the
    options the usual environment variables hold (``AWS_ENDPOINT_URL``, ``AWS_REGION``, credentials).

    Raises:
        ValueError: nothing opens such a URI.
        OSError: the server doesn't answer.
        ImportError: fsspec isn't installed, or lacks what the URI needs.
    """
    import pyarrow as pa
    import pyarrow.fs

    if uri.startswith("s3://"):
        return _open_s3(uri)
    try:
        filesystem, root = pyarrow.fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        import fsspec

        inner, root = fsspec.core.url_to_fs(uri)
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(inner))
    return filesystem, root.rstrip("/")


def _open_s3(uri: str) -> tuple["pyarrow.fs.FileSystem", str]:
    import pyarrow.fs

    parts = urlsplit(uri)
    bucket = parts.netloc.rpartition("@")[2]
    given = dict(parse_qsl(parts.query))
    if unknown := sorted(given.keys() - _S3_OPTIONS):
        raise ValueError(
            f"unknown option {', '.join(unknown)}; an S3 URI takes {', '.join(sorted(_S3_OPTIONS))}"
        )  # fmt: skip
    options: dict[str, Any] = dict(given)
    if parts.username and parts.password:
        options |= {"access_key": unquote(parts.username), "secret_key": unquote(parts.password)}
    if "endpoint_override" not in options and (endpoint := _endpoint()):
        options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    if "region" not in options and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        # Amazon knows where its bucket is; elsewhere any name does, and looking for one costs seconds of time-outs.
        elsewhere = "endpoint_override" in options
        options["region"] = "us-east-1" if elsewhere else pyarrow.fs.resolve_s3_region(bucket)
    # A small file is one request in place of three, and appears or doesn't.
    filesystem = pyarrow.fs.S3FileSystem(allow_delayed_open=True, **options)
    return filesystem, f"{bucket}{unquote(parts.path)}".rstrip("/")


def _endpoint() -> SplitResult | None:
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return urlsplit(given) if given else None
