"""Tests of ``captioning/data/text_files.py``."""

import codecs

import pytest

from captioning.data import text_files


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("c.xlsx", b"PK\x03\x04rest", "c.xlsx is a spreadsheet; save it as CSV UTF-8"),
        ("c.ods", b"PK\x03\x04rest", "c.ods is a spreadsheet; save it as CSV UTF-8"),
        ("c.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", "c.xls is a spreadsheet; save it as CSV UTF-8"),
        ("c.parquet", b"PAR1rest", "c.parquet is a Parquet file, expected a text; save it as CSV"),
        ("c.jpg", b"\xff\xd8\xff\xe0rest", "c.jpg is a JPEG file, expected a text"),
        ("c.zip", b"PK\x03\x04rest", "c.zip is a zip archive; unpack it"),
        ("c.csv", b"a\nb \x80 c", "c.csv, line 2: not UTF-8 text: the byte 80; save the file as"),
        ("c.csv", "a\n\nEin Tür".encode("cp1252"), "line 3: .* the byte FC, in Windows-1252 'ü';"),
        ("c.csv", codecs.BOM_UTF16_LE + b"a\0b", "c.csv: not whole UTF-16 text"),
    ],
)
def test_what_is_no_text_in_utf8_is_told_what_to_do(name, data, message, tmp_path, fails):
    (tmp_path / name).write_bytes(data)
    with fails(message):
        text_files.read_text(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_utf8_and_utf16_are_read_alike(encoding, tmp_path):
    (tmp_path / "c.csv").write_text("Tür 漢字 🐕", encoding=encoding)
    assert text_files.read_text(tmp_path / "c.csv") == "Tür 漢字 🐕"
