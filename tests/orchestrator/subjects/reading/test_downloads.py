"""Downloads, against a server on this machine: verified, resumed, never trusted."""

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.downloads import REMOTES, Remote, download

CONTENT = bytes(range(256)) * 20_000  # 5 MB


class Server:
    """Serves bytes by path; can break off after some, ignore ranges, and remembers what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_after: int | None = None
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.asked.append((self.path, wanted))
                content = outer.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and outer.ranges else 0
                if start >= len(content) > 0:
                    self.send_error(416)
                    return
                self.send_response(206 if wanted and outer.ranges else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                end = len(content) if outer.break_after is None else start + outer.break_after
                self.wfile.write(content[start:end])

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    instance = Server()
    thread = threading.Thread(target=instance.http.serve_forever, daemon=True)
    thread.start()
    yield instance
    instance.http.shutdown()
    thread.join()


def remotes(
    server: Server, content: bytes = CONTENT, *, mirrors: int = 1, **more: bool
) -> dict[str, tuple[Remote, ...]]:
    urls = tuple(f"{server.url}/{i}/data.bin" for i in range(mirrors))
    return {"mine": (Remote("data.bin", hashlib.md5(content).hexdigest(), urls, **more),)}


def test_a_file_is_fetched_once_and_whole(server: Server, tmp_path: Path) -> None:
    server.files["/0/data.bin"] = CONTENT
    seen: list[tuple[str, int, int | None]] = []
    folder = download("mine", tmp_path, remotes=remotes(server), on_progress=lambda *facts: seen.append(facts))
    assert (folder / "data.bin").read_bytes() == CONTENT and folder == tmp_path / "mine"
    assert seen[-1] == ("data.bin", len(CONTENT), len(CONTENT)) and len(seen) > 3
    download("mine", tmp_path, remotes=remotes(server))
    assert len(server.asked) == 1
    assert [path.name for path in folder.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(ranges: bool, server: Server, tmp_path: Path) -> None:
    server.files["/0/data.bin"] = CONTENT
    server.break_after, server.ranges = 2_000_000, ranges
    with pytest.raises(UserError, match=r"broke off after 2000000 of 5120000 bytes.*run the command again"):
        download("mine", tmp_path, remotes=remotes(server))
    assert not (tmp_path / "mine" / "data.bin").exists()
    server.break_after = None
    download("mine", tmp_path, remotes=remotes(server))
    assert server.asked[-1][1] == "bytes=2000000-"
    assert (tmp_path / "mine" / "data.bin").read_bytes() == CONTENT


def test_a_part_that_is_all_there_is_taken(server: Server, tmp_path: Path) -> None:
    server.files["/0/data.bin"] = CONTENT
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.bin.part").write_bytes(CONTENT)
    assert (download("mine", tmp_path, remotes=remotes(server)) / "data.bin").read_bytes() == CONTENT


def test_what_has_another_checksum_never_gets_the_name(server: Server, tmp_path: Path) -> None:
    server.files["/0/data.bin"] = b"<html>moved</html>"
    with pytest.raises(UserError, match="the checksum is"):
        download("mine", tmp_path, remotes=remotes(server))
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_damaged_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    server.files["/0/data.bin"] = CONTENT
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.bin").write_bytes(CONTENT[:-1])
    assert (download("mine", tmp_path, remotes=remotes(server)) / "data.bin").read_bytes() == CONTENT


def test_the_next_mirror_is_tried(server: Server, tmp_path: Path) -> None:
    server.files["/0/data.bin"], server.files["/2/data.bin"] = b"damaged", CONTENT
    download("mine", tmp_path, remotes=remotes(server, mirrors=3))
    assert [path for path, _ in server.asked] == ["/0/data.bin", "/1/data.bin", "/2/data.bin"]


def archive(name: str, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        if link:
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)
        else:
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "evil", [archive("../outside"), archive("/tmp/outside"), archive("batches/two", "../../outside")]
)
def test_an_archive_is_unpacked_inside_its_folder_only(server: Server, tmp_path: Path, evil: bytes) -> None:
    good = archive("batches/one")
    server.files["/0/data.bin"] = good
    folder = download("mine", tmp_path, remotes=remotes(server, good, unpack=True))
    assert (folder / "batches" / "one").read_bytes() == b"abc"
    server.files["/0/data.bin"] = evil
    with pytest.raises(UserError, match="can't be unpacked"):
        download("mine", tmp_path, remotes=remotes(server, evil, unpack=True))
    assert not (tmp_path / "outside").exists() and not Path("/tmp/outside").exists()
    assert not (folder / "batches" / "two").is_symlink()


def test_only_http_is_fetched(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    remote = Remote("data.bin", hashlib.md5(CONTENT).hexdigest(), (secret.as_uri(),))
    with pytest.raises(UserError, match="only http and https"):
        download("mine", tmp_path, remotes={"mine": (remote,)})


def test_what_may_not_be_given_on_says_where_to_get_it(tmp_path: Path) -> None:
    for name in ("utkface", "imagenet"):
        with pytest.raises(UserError, match=f"put it into .*{name}"):
            download(name, tmp_path)
    with pytest.raises(UserError, match=r"nothing to download for digits; there is for cifar10, fashion_mnist"):
        download("digits", tmp_path)


def test_the_known_files_have_checksums() -> None:
    for files in REMOTES.values():
        for remote in files:
            assert len(remote.md5) == 32 and all(url.startswith("http") for url in remote.urls)
