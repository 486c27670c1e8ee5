"""Folders of image files and manifests from the adversary: each is refused in one sentence, or harmless."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from antibackdoor.data import decoding
from antibackdoor.data.decoding import decode_image
from antibackdoor.data.load import load
from antibackdoor.errors import InputError
from hostile_files import Case, encoded, folder, png, refused, sparse, written


def link(target: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (folder(root) / "cat" / "bad.png").symlink_to(target)
        return root

    return make


def piped(root: Path) -> Path:
    os.mkfifo(folder(root) / "cat" / "bad.png")
    return root


def grown(root: Path) -> Path:
    sparse(folder(root) / "cat" / "bad.png", 2**40, encoded())
    return root


def looping(root: Path) -> Path:
    (folder(root) / "bird").symlink_to(root)
    return root


def itself(root: Path) -> Path:
    (folder(root) / "cat" / "bad.png").symlink_to("bad.png")
    return root


def deep(root: Path) -> Path:
    (folder(root) / "/".join(["cat"] + ["d"] * 200)).mkdir(parents=True)
    return root


def named(name: str | bytes) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        place = os.fsencode(folder(root)) + b"/cat/" + (name if isinstance(name, bytes) else name.encode())
        Path(os.fsdecode(place)).write_bytes(b"no image")
        return root

    return make


def classed(name: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (folder(root) / name).mkdir()
        (root / name / "x.png").write_bytes(b"no image")
        return root

    return make


WHOLE = encoded(size=(40, 40))
JPEG, WEBP, BMP, PPM = (encoded(form, (40, 40)) for form in ("JPEG", "WEBP", "BMP", "PPM"))


def scanned(times: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    content = encoded("JPEG", (1000, 1000), progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last[:12] * times + content[-2:]


GIF, TIFF = (encoded(form, (8, 8)) for form in ("GIF", "TIFF"))
BOMB_TEXT = (b"zTXt", b"note\x00\x00" + zlib.compress(bytes(2**27)))
BOMB_PROFILE = (b"iCCP", b"icc\x00\x00" + zlib.compress(bytes(2**27)))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/x) (w) file\n%%EOF\n"
HUGE = r"pixels\)? (are more than the|exceeds) limit"

FILES: dict[str, tuple[bytes, str, str]] = {
    "empty file": (b"", "bad__png", "cannot identify image file"),
    "text": (b"hello", "bad__png", "cannot identify image file"),
    "png 60000x60000, a header and no pixels": (png(60000, 60000, pixels=b""), "bad__png", HUGE),
    "png 2147483647x1": (png(2**31 - 1, 1, pixels=b""), "bad__png", "pixels"),
    "png 0x0": (png(0, 0), "bad__png", "cannot identify image file"),
    "png 4294967295x4294967295": (png(2**32 - 1, 2**32 - 1, pixels=b""), "bad__png", "pixels"),
    "bmp 60000x60000": (BMP[:18] + struct.pack("<ii", 60000, 60000) + BMP[26:], "bad__bmp", HUGE),
    "bmp -2147483648 high": (BMP[:18] + struct.pack("<ii", 8, -(2**31)) + BMP[26:], "bad__bmp", HUGE),
    "ppm 60000x60000": (b"P6 60000 60000 255\n", "bad__ppm", HUGE),
    "ppm 99999999999x1": (b"P6 99999999999 1 255\n", "bad__ppm", "Token too long in file header"),
    "ppm maxval 0": (b"P6 8 8 0\n" + bytes(192), "bad__ppm", "maxval must be greater than 0"),
    "ppm maxval 99999": (
        b"P6 8 8 99999\n" + bytes(192),
        "bad__ppm",
        "maxval must be greater than 0 and less than 65536",
    ),
    "ppm plain with one endless number": (b"P3 8 8 255\n" + b"1" * 10**6, "bad__ppm", "Token too long found in data"),
    "pgm cut off": (b"P5 40 40 255\n" + bytes(7), "bad__pgm", "truncated|not enough"),
    "png cut off": (WHOLE[:900], "bad__png", "Truncated File Read"),
    "jpeg cut off": (JPEG[: len(JPEG) // 2], "bad__jpg", "truncated"),
    "webp cut off": (WEBP[: len(WEBP) // 2], "bad__webp", "could not create decoder object"),
    "bmp cut off": (BMP[: len(BMP) // 2], "bad__bmp", "truncated"),
    "png with a wrong checksum": (WHOLE[:20] + b"\xff" + WHOLE[21:], "bad__png", "cannot identify image file"),
    "png with damaged pixels": (png(8, 8, pixels=b"\x09" * 72), "bad__png", "unrecognized data stream contents"),
    "png with too few pixels": (png(40, 40, pixels=b"\x00" * 40), "bad__png", "image file is truncated"),
    "png with a bomb as its text": (png(8, 8, BOMB_TEXT), "bad__png", "Decompressed data too large"),
    "png with a bomb as its profile": (png(8, 8, BOMB_PROFILE), "bad__png", "Decompressed data too large"),
    "jpeg of nothing but markers": (
        b"\xff\xd8" + b"\xff\xe1\x00\x02" * 10**5,
        "bad__jpg",
        "cannot identify image file",
    ),
    "jpeg of ten thousand scans": (scanned(10_000), "bad__jpg", "10010 scans of 1000x1000 pixels are more than any"),
    "jpeg that says 65535x65535": (
        JPEG.replace(struct.pack(">BHH", 8, 40, 40), struct.pack(">BHH", 8, 65535, 65535)),
        "bad__jpg",
        HUGE,
    ),
    "webp whose header lies about its size": (
        WEBP[:4] + b"\xff\xff\xff\x7f" + WEBP[8:],
        "bad__webp",
        "could not create decoder object",
    ),
    "svg under the name of a png": (SVG, "bad__png", "cannot identify"),
    "svg under its own name": (SVG, "bad__svg", "not an image file by its name"),
    "postscript under the name of a png": (EPS, "bad__png", "cannot identify"),
    "gif under the name of a png": (GIF, "bad__png", "cannot identify"),
    "tiff under the name of a png": (TIFF, "bad__png", "cannot identify"),
    "pickle under the name of a png": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "bad__png", "cannot identify"),
    "zip under the name of a png": (b"PK\x03\x04" + bytes(60), "bad__png", "cannot identify"),
    "html under the name of a jpg": (b"<html><script>alert(1)</script>", "bad__jpg", "cannot identify"),
    "python file": (b"import os", "bad__py", "not an image file by its name"),
    "png with two names": (encoded(), "bad__png__exe", "not an image file by its name"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_image_files(tmp_path: Path, case: str) -> None:
    content, name, reason = FILES[case]
    root = folder(tmp_path / "set", **{name: content})
    refused(lambda: load(root), rf"1 of 5 files in .* cannot be read as images \(cat/bad\.[\w.]+: .*{reason}.*--skip")


FOLDERS: dict[str, Case] = {
    "link to a file outside": (link("/etc/passwd"), "link out of the data set"),
    "link to a folder outside": (link("/etc"), "link out of the data set"),
    "link with dots": (link("../../../outside.png"), "link out of the data set"),
    "link to nothing": (link("nowhere.png"), "link out of the data set, to a folder or to nothing"),
    "link to itself": (itself, "link out of the data set, to a folder or to nothing"),
    "folders 200 deep": (deep, "more than 64 deep"),
    "folder within itself": (looping, "link out of the data set"),
    "link to a device": (link("/dev/zero"), "link out of the data set"),
    "pipe": (piped, "pipe, a device or a socket"),
    "a terabyte": (grown, "at most 67,108,864 are read"),
    "name with a line break": (named("a\nerror: fine.png"), r"cat/a\\nerror: fine\.png"),
    "name with a terminal escape": (named("\x1b[2J\x1b]0;owned\x07.png"), r"cat/\\x1b\[2J\\x1b\]0;owned\\x07\.png"),
    "name with a carriage return": (named("a\rOK.png"), r"cat/a\\rOK\.png"),
    "name that turns the direction": (named("\u202egnp.exe.png"), r"cat/\\u202egnp\.exe\.png"),
    "name that is no text": (named(b"\xff\xfe.png"), r"cat/\\udcff\\udcfe\.png"),
    "name with html": (named("<img src=x onerror=alert(1)>.png"), "cat/<img src=x onerror"),
    "name with quotes": (named("a'\"; rm -rf x;'.png"), "rm -rf"),
    "class with a line break": (classed("a\nb"), r"a\\nb/x\.png"),
    "class with a terminal escape": (classed("\x1b[31m"), r"\\x1b\[31m/x\.png"),
    "class of 255 characters": (classed("x" * 255), "x{255}/x.png"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folders(tmp_path: Path, case: str) -> None:
    make, sentence = FOLDERS[case]
    root = make(tmp_path / "set")
    refused(lambda: load(root), sentence)


def test_a_folder_that_would_not_fit_into_memory(tmp_path: Path) -> None:
    refused(lambda: load(folder(tmp_path / "set"), image_size=2**20), "GiB of memory, but this machine has")


HEAD = "path,label\n"
MANIFESTS: dict[str, tuple[str | bytes, str]] = {
    "path with dots": (HEAD + "../x.png,a\n", "leads out of"),
    "path with dots in the middle": (HEAD + "cat/../../x.png,a\n", "leads out of"),
    "absolute path": (HEAD + "/etc/passwd,a\n", "leads out of"),
    "path through a link": (HEAD + "out/passwd,a\n", "leads out of"),
    "path of a device": (HEAD + "/dev/zero,a\n", "leads out of"),
    "path with a NUL": (HEAD + "cat/\x00.png,a\n", r"cat/\\x00\.png"),
    "path of 100,000 characters": (HEAD + "c" * 100_000 + ",a\n", "as a CSV file.*File name too long"),
    "field beyond the parser's limit": (HEAD + "c" * 200_000 + ",a\n", "field larger than field limit"),
    "path of a folder": (HEAD + "cat,a\ndog/0.png,b\n", "1 of 2 files.*not an image file by its name"),
    "path of an address": (HEAD + "http://example.org/x.png,a\n", "1 of 1 files.*no such file"),
    "path of a network share": (HEAD + r"\\host\share\x.png,a" + "\n", "1 of 1 files.*no such file"),
    "path with a line break": (HEAD + '"a\nb.png",a\n', r"1 of 1 files.*a\\nb\.png: no such file"),
    "path with a formula": (HEAD + "\"=cmd|' /C calc'!A0\",a\n", "1 of 1 files.*=cmd"),
    "label of 5,000 characters": (HEAD + f"cat/0.png,{'a' * 5000}\n", "name of 5,000 characters"),
    "quote that never ends": (HEAD + '"cat/0.png,a\n', "line 2 has no path or no label"),
    "bytes that are no text": (HEAD.encode() + b"\xff\xfe,a\n", "it is not UTF-8 text"),
    "UTF-16": ("path,label\ncat/0.png,a\n".encode("utf-16"), "it is not UTF-8 text"),
    "two columns called path": ("path,path,label\ncat/0.png,/etc/passwd,a\n", "has the column path twice"),
    "a hundred thousand columns": (
        "path,label" + ",x" * 100_000 + "\n" + "cat/bad.png,a\n" * 2,
        "line 3 names 'cat/bad.png' a second time",
    ),
    "only separators": (",,,,\n" * 1000, "needs the column label, beside path"),
    "one file twice": (HEAD + "cat/0.png,a\ncat/./0.png,b\n", "a second time"),
    "image of 60000x60000": (HEAD + "cat/bad.png,a\ndog/0.png,b\n", HUGE),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_bad_manifests(tmp_path: Path, case: str) -> None:
    text, sentence = MANIFESTS[case]
    root = folder(tmp_path / "set", bad__png=png(60000, 60000, pixels=b""))
    (root / "out").symlink_to("/etc")
    refused(lambda: load(written(root / "list.csv", text)), sentence)


def test_a_manifest_without_an_end(tmp_path: Path) -> None:
    refused(lambda: load(sparse(tmp_path / "list.csv", 2**40, HEAD.encode())), "at most 4,294,967,296 are read")


def test_a_manifest_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.csv")
    refused(lambda: load(tmp_path / "list.csv"), "pipe, a device or a socket")


EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn right
HARMLESS: dict[str, bytes] = {
    "1x1": png(1, 1),
    "1x60000": png(1, 60000),
    "png with an archive behind its end": encoded() + b"PK\x05\x06" + bytes(18),
    "png with a page behind its end": encoded() + b"<script>alert(1)</script>",
    "jpeg with a page in its comment": encoded("JPEG", comment=b"<script>alert(1)</script>"),
    "jpeg with a broken profile": encoded("JPEG", icc_profile=b"no profile at all" * 100),
    "jpeg with a profile that lies about its size": encoded("JPEG", icc_profile=b"\xff\xff\xff\xff" + bytes(200)),
    "jpeg with broken EXIF": encoded("JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
    "jpeg with EXIF whose directory points at itself": encoded(
        "JPEG",
        exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x69\x87\x04\x00\x01\x00\x00\x00\x08\x00\x00\x00"
        b"\x08\x00\x00\x00",
    ),
    "jpeg under the name of a png": encoded("JPEG"),
    "jpeg of ten scans": encoded("JPEG", progressive=True, restart_marker_blocks=1),
    "jpeg with ends and scans in its comment": encoded("JPEG", comment=b"\xff\xda\xff\xd9" * 500),
    "webp of many frames": encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))] * 50),
    "png of many frames": encoded("PNG", save_all=True, append_images=[Image.new("RGB", (8, 8))] * 50),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_strange_images_are_read_for_their_pixels_alone(tmp_path: Path, case: str) -> None:
    splits = load(folder(tmp_path / "set", odd__png=HARMLESS[case]))
    assert len(splits.train) == 5 and splits.train.spec.shape == (3, 8, 8)


def test_orientation_is_not_applied() -> None:
    plain, turned = encoded("JPEG", (16, 8)), encoded("JPEG", (16, 8), exif=EXIF.tobytes())
    assert (decode_image(plain, (16, 8)) == decode_image(turned, (16, 8))).all()


def test_large_images_are_decoded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some at once, 64 million pixels each, would take some GiB."""
    held: list[int] = []
    inner, most = decoding._decoded, []

    def counted(image: Image.Image, encoded: bytes, size: tuple[int, int]) -> object:
        held.append(1)
        most.append(len(held))
        time.sleep(0.005)
        held.pop()
        return inner(image, encoded, size)

    monkeypatch.setattr(decoding, "_decoded", counted)
    root = folder(tmp_path / "set", **{f"{k}__png": encoded() for k in range(12)})
    load(root)
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr(decoding, "LARGE", 63)
    load(root)
    assert max(most) == 1 and len(most) == 14


def test_the_middle_of_a_long_sentence_is_left_out() -> None:
    told = str(InputError("a" * 5000 + "\n" + "b" * 5000))
    assert len(told) < 2100 and told.startswith("aaa") and told.endswith("bbb") and " ... " in told
