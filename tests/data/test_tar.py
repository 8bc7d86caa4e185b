"""Members of tars of all makes, against Python's tarfile."""

from __future__ import annotations

import io
import tarfile

import pytest

import cmvae.data.tar
from cmvae.data.tar import read_members

CONTENTS = {"k0.cls": b"3", "k0.m0.png": bytes(range(256)) * 5, "k1.cls": b"", "k1.m0.png": bytes(512)}


def make_tar(names: dict[str, bytes], mode: str = "w", tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tar_format) as tar:
        for name, content in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def by_tarfile(content: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isreg()]


@pytest.fixture
def without_tarfile(monkeypatch):
    """Plain tars must not need it: that is what reading by hand is for."""

    def refuse(*_, **__):
        raise AssertionError("WebDataset was asked")

    monkeypatch.setattr(cmvae.data.tar, "tar_file_iterator", refuse)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_tars_are_read_by_hand(without_tarfile, tar_format):
    content = make_tar(CONTENTS, tar_format=tar_format)
    assert list(read_members(io.BytesIO(content))) == list(CONTENTS.items()) == by_tarfile(content)


def test_a_tar_without_its_last_blocks_ends_after_its_last_member(without_tarfile):
    content = make_tar(CONTENTS)
    end = content.rindex(b"k1.m0.png") + 512 + 512
    assert list(read_members(io.BytesIO(content[:end]))) == list(CONTENTS.items())


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_the_middle_are_read_by_webdataset(tar_format):
    names = {**CONTENTS, "é" * 120: b"long", "a/" * 70 + "b": b"deep", "k9.cls": b"9"}
    content = make_tar(names, tar_format=tar_format)
    assert list(read_members(io.BytesIO(content))) == list(names.items()) == by_tarfile(content)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_compressed_tars_are_read_by_webdataset(mode):
    assert list(read_members(io.BytesIO(make_tar(CONTENTS, mode)))) == list(CONTENTS.items())


def test_links_and_folders_are_no_members():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("k0.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"3"))
    assert list(read_members(io.BytesIO(buffer.getvalue()))) == [("k0.cls", b"3")]


def test_a_cut_tar_is_an_error_after_what_is_whole():
    content = make_tar(CONTENTS)
    members = read_members(io.BytesIO(content[: content.index(b"k0.m0.png") + 512 + 700]))
    assert next(members) == ("k0.cls", b"3")
    with pytest.raises(tarfile.ReadError, match="unexpected end of data"):
        next(members)


@pytest.mark.parametrize("place", [0, 100, 124, 130, 150])
def test_a_changed_header_is_an_error(place):
    content = bytearray(make_tar(CONTENTS))
    header = content.index(b"k1.cls")
    content[header + place] ^= 0x01
    members = read_members(io.BytesIO(bytes(content)))
    assert [next(members), next(members)] == list(CONTENTS.items())[:2]
    with pytest.raises(tarfile.ReadError):
        next(members)


@pytest.mark.parametrize("content", [b"", b"no tar at all", bytes(700)])
def test_what_is_no_tar_is_an_error_or_empty_as_for_tarfile(content):
    try:
        expected = by_tarfile(content)
    except tarfile.ReadError:
        with pytest.raises(tarfile.ReadError):
            list(read_members(io.BytesIO(content)))
    else:
        assert list(read_members(io.BytesIO(content))) == expected == []
