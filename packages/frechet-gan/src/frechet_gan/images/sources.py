"""Where images come from: a folder, a zip file, or an npz of an array (n, h, w, c) as ADM's evaluator takes it.

A source is a sequence of pixels (h, w, c), uint8, that worker processes can share: it opens its file when it is first
read, in each process.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from core_tensor.app import files
from core_tensor.app.files import reading

from frechet_gan.images.decoding import SUFFIXES, decode, is_grey, is_image


@dataclass
class Source:
    """Images by name.

    Attributes:
        path: Folder or file.
        names: Names of the images inside, sorted.
        skipped: Names of other files inside, which are no images by their name; hidden files are not counted.
    """

    path: Path
    names: Sequence[str]
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        """Pixels of an image, shape (h, w, 1 or 3), uint8."""
        raise NotImplementedError

    def grey(self) -> bool:
        """Whether all images are grey."""
        raise NotImplementedError

    def digest(self) -> str:
        """Digest of the content: names and bytes."""
        return files.digest(self.path)

    def note(self) -> str | None:
        """A line about files that were skipped, or None."""
        if not self.skipped:
            return None
        some = ", ".join(self.skipped[:3]) + (", ..." if len(self.skipped) > 3 else "")
        count = f"{len(self.skipped)} files are" if len(self.skipped) > 1 else "1 file is"
        return f"{self.path}: {count} no image by name and skipped ({some})"

    def jpeg_share(self) -> float:
        """Share of names that are JPEG's, whose compression itself moves features."""
        names = [str(name).lower() for name in self.names]
        return sum(name.endswith((".jpg", ".jpeg", ".jpe", ".jfif")) for name in names) / len(names)


@dataclass
class FolderSource(Source):
    """Image files below a folder; links to folders are followed."""

    def __getitem__(self, index: int) -> Any:
        """Pixels of an image, shape (h, w, 1 or 3), uint8."""
        path = self.path / self.names[index]
        return decode(path, str(path))

    def grey(self) -> bool:
        """Whether all images are grey, by their headers; the first colored one ends the search."""
        return all(is_grey(self.path / name) for name in self.names)

    def digest(self) -> str:
        """Digest of the names and bytes of the images."""
        return files.digest(*(part for name in self.names for part in (name, self.path / name)))


@dataclass
class ZipSource(Source):
    """Image files in a zip file."""

    _opened: zipfile.ZipFile | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, index: int) -> Any:
        """Pixels of an image, shape (h, w, 1 or 3), uint8."""
        name = f"{self.path}/{self.names[index]}"
        with reading(self.path, "a zip file of images"):
            if self._opened is None:
                self._opened = zipfile.ZipFile(self.path)
            content = self._opened.read(self.names[index])
        return decode(content, name)

    def __getstate__(self) -> dict[str, Any]:
        """State for worker processes, each of which opens the file itself."""
        return {**self.__dict__, "_opened": None}

    def grey(self) -> bool:
        """Whether all images are grey; the first colored one ends the search."""
        return all(self[i].shape[2] == 1 for i in range(len(self)))


@dataclass
class ArraySource(Source):
    """The rows of an array of images, mapped from disk where the file is not compressed."""

    _rows: Any = field(default=None, repr=False, compare=False)

    def __getitem__(self, index: int) -> Any:
        """Pixels of an image, shape (h, w, 1 or 3), uint8."""
        if self._rows is None:
            self._rows = _array(self.path)
        return self._rows[index]

    def __getstate__(self) -> dict[str, Any]:
        """State for worker processes, each of which maps the file itself."""
        return {**self.__dict__, "_rows": None}

    def grey(self) -> bool:
        """Whether the images have one channel."""
        return bool(self[0].shape[2] == 1)


def open_images(path: str | os.PathLike[str]) -> Source:
    """The images of a folder, a zip file or an npz file with `arr_0`.

    Args:
        path: Folder or file.

    Returns:
        The images in the order of their names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no images.
    """
    root = Path(path)
    if root.is_dir():
        names = sorted(_walk(root))
        source: Source = FolderSource(root, *_split(names))
    elif not root.exists():
        raise FileNotFoundError(2, "No such file or directory", str(root))
    elif root.suffix.lower() == ".zip":
        with reading(root, "a zip file of images"), zipfile.ZipFile(root) as archive:
            names = sorted(i.filename for i in archive.infolist() if not i.is_dir() and not _hidden(i.filename))
        source = ZipSource(root, *_split(names))
    elif root.suffix.lower() == ".npz":
        rows = _array(root)
        source = ArraySource(root, range(len(rows)), (), rows)  # type: ignore[arg-type]
    else:
        raise ValueError(f"{root}: expected a folder of images, a zip file of them, or an npz file with arr_0")
    if not len(source):
        raise ValueError(f"{root}: expected images ({' '.join(sorted(SUFFIXES))}), found none")
    return source


def _walk(root: Path) -> list[str]:
    """Names of files below a folder; links are followed, but into no folder twice on one way down."""
    found = []
    for folder, below, inside in os.walk(root, followlinks=True):
        here = Path(folder)
        above = {p.resolve() for p in (here, *here.parents) if p.is_relative_to(root)}
        below[:] = [b for b in below if not b.startswith(".") and (here / b).resolve() not in above]
        relative = here.relative_to(root)
        found += [(relative / name).as_posix() for name in inside if not name.startswith(".")]
    return found


def _hidden(name: str) -> bool:
    """Whether a file in an archive is hidden, or one of macOS's shadows."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    return [n for n in names if is_image(n)], [n for n in names if not is_image(n)]


def _array(path: Path) -> Any:
    """The array `arr_0` of an npz file, mapped if it is stored without compression."""
    with reading(path, "an npz file with images arr_0, shape (n, h, w, 1 or 3), uint8"):
        with zipfile.ZipFile(path) as archive:
            entry = next((i for i in archive.infolist() if i.filename == "arr_0.npy"), None)
            if entry is None:
                raise ValueError(f"no arr_0 among {', '.join(archive.namelist()[:6])}")
            with archive.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                layout = np.lib.format
                header = layout.read_array_header_1_0 if version == (1, 0) else layout.read_array_header_2_0
                shape, fortran, dtype = header(stream)
                offset = stream.tell()
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise ValueError(f"arr_0 is {dtype} {shape}")
        if entry.compress_type != zipfile.ZIP_STORED:
            return files.read_npz(path, "arr_0")["arr_0"]
        with path.open("rb") as raw:  # the local header's lengths may differ from the directory's
            raw.seek(entry.header_offset)
            local = raw.read(30)
            if len(local) < 30 or local[:4] != b"PK\3\4":
                raise ValueError("its directory points elsewhere")
            name_length, extra_length = struct.unpack("<HH", local[26:30])
            start = entry.header_offset + 30 + name_length + extra_length + offset
        if start + math.prod(int(s) for s in shape) > path.stat().st_size:
            raise ValueError("it is truncated")
        return np.memmap(path, np.uint8, "r", start, tuple(shape))
