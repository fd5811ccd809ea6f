"""Fetching datasets that may be redistributed: on request only, resumable, verified before they get their name."""

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.contract.errors import UserError

CHUNK = 1 << 20
TIMEOUT = 60.0
"""Seconds without an answer after which a server counts as gone."""


@dataclass(frozen=True)
class Remote:
    """A file of a dataset on a server."""

    name: str
    md5: str
    """As its publisher gives it."""
    urls: tuple[str, ...]
    """Mirrors, tried in turn."""
    unpack: bool = False
    """Whether it is a tar archive to be unpacked."""


def _idx(base: Sequence[str], md5s: Mapping[str, str]) -> tuple[Remote, ...]:
    return tuple(Remote(name, md5, tuple(url + name for url in base)) for name, md5 in md5s.items())


REMOTES: Mapping[str, tuple[Remote, ...]] = {
    "mnist": _idx(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion_mnist": _idx(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": (
        Remote(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            unpack=True,
        ),
    ),
    "pathmnist": (
        Remote(
            "pathmnist.npz",
            "a8b06965200029087d5bd730944a56c1",
            ("https://zenodo.org/records/10519652/files/pathmnist.npz?download=1",),
        ),
    ),
}
"""Files of each dataset, with the checksums of their publishers."""

SAME_FILES = {"cifar10s": "cifar10", "bp_mnist": "pathmnist"}
"""Subjects made from another's files."""

BY_HAND = {
    "utkface": "UTKFace is for non-commercial research and given out by its authors (susanqq.github.io/UTKFace)",
    "imagenet": "ImageNet is given out after registration (image-net.org)",
}

DownloadProgress = Callable[[str, int, int | None], None]
"""Called with (file, bytes there, bytes in all if the server says so)."""


def download(
    name: str,
    root: Path,
    *,
    remotes: Mapping[str, tuple[Remote, ...]] = REMOTES,
    on_progress: DownloadProgress | None = None,
) -> Path:
    """Fetch a dataset into ``root/<dataset>``; files that are there already, whole, are left alone.

    Args:
        name: of the subject.
        root: the data root; created when missing.
        remotes: where the files are.
        on_progress: told after every chunk.

    Returns:
        The dataset's folder.

    Raises:
        UserError: the dataset can't be downloaded, no server answers, or what it sends has another checksum.
    """
    dataset = SAME_FILES.get(name, name)
    if dataset in BY_HAND:
        raise UserError(f"{BY_HAND[dataset]}, so it can't be downloaded here; put it into {root / dataset}.")
    if dataset not in remotes:
        raise UserError(f"There is nothing to download for {name}; there is for {', '.join(sorted(remotes))}.")
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    for remote in remotes[dataset]:
        target = folder / remote.name
        if not (target.is_file() and md5_of(target) == remote.md5):
            _fetch(remote, target, on_progress)
        if remote.unpack:
            _unpack(target)
    return folder


def _fetch(remote: Remote, target: Path, on_progress: DownloadProgress | None) -> None:
    partial = target.with_name(f"{target.name}.part")
    reasons = []
    for url in remote.urls:
        try:
            _transfer(url, partial, remote.name, on_progress)
        except (urllib.error.URLError, OSError, ValueError) as error:
            reasons.append(f"{url}: {error}")
            continue
        found = md5_of(partial)
        if found == remote.md5:
            partial.replace(target)
            return
        # What is wrong as a whole can't be resumed.
        partial.unlink()
        reasons.append(f"{url}: the checksum is {found}, not {remote.md5}")
    raise UserError(
        f"{remote.name} couldn't be downloaded ({'; '.join(reasons)}); run the command again to go on where it "
        f"stopped, or put the file into {target.parent}."
    )


def _transfer(url: str, partial: Path, name: str, on_progress: DownloadProgress | None) -> None:
    """Append what is missing of ``partial``; start anew if the server can't send a part."""
    if not url.startswith(("https://", "http://")):
        raise ValueError("only http and https addresses are fetched")
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # nothing is missing
            return
        raise
    with response:
        resumed = response.status == 206
        there = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = there + int(length) if length else None
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                there += len(chunk)
                if on_progress is not None:
                    on_progress(name, there, total)
    if total is not None and there < total:
        raise OSError(f"the connection broke off after {there} of {total} bytes")


def _unpack(archive: Path) -> None:
    """Write an archive's files and folders into its own folder, and refuse what would be a link or outside.

    tarfile's own filter for that came with Python 3.11.4, and Debian 12 has 3.11.2.
    """
    folder = archive.parent.resolve()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                target = (folder / member.name).resolve()
                if not target.is_relative_to(folder) or not (member.isfile() or member.isdir()):
                    raise tarfile.TarError(f"{member.name} is no file or folder inside it")
                if (content := tar.extractfile(member)) is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with content, target.open("wb") as file:
                        shutil.copyfileobj(content, file)
    except tarfile.TarError as error:
        raise UserError(f"{archive} can't be unpacked ({error}); delete it and download it again.") from error


def known_md5(dataset: str, name: str) -> str | None:
    """The checksum that a dataset's publisher gives for a file; None when there is none."""
    return next((remote.md5 for remote in REMOTES.get(dataset, ()) if remote.name == name), None)


def md5_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
