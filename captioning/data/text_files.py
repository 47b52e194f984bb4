"""Texts as people save them: UTF-8 or UTF-16, and what is said of everything else."""

import codecs
import os

from captioning.data.pictures import read_bytes
from captioning.run.messages import UserError, why

PACKED = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how .xlsx, .ods and archives begin, and .xls
OTHERS = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG"}


def read_text(path):
    """The text of a file in UTF-8 or, if it begins with a byte order mark, in UTF-16.

    :param path: of a file; a ``zipfile.Path`` too
    :raises UserError: if it cannot be read, or is a spreadsheet or in another encoding
    """
    try:
        data = read_bytes(path)
    except Exception as error:  # zipfile raises several types on damaged archives
        raise UserError(f"cannot read {path}: {why(error)}") from error
    if data.startswith(PACKED):
        what = "a spreadsheet; save it as CSV UTF-8 in your program, and give that file"
        if os.path.splitext(path.name)[1].lower() == ".zip":
            what = "a zip archive; unpack it, and give the file of captions"
        raise UserError(f"{path} is {what}")
    for beginning, kind in OTHERS.items():
        if data.startswith(beginning):
            raise UserError(f"{path} is a {kind} file, expected a text; save it as CSV UTF-8")
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        if is_utf16:
            raise UserError(f"{path}: not whole UTF-16 text; save it as CSV UTF-8") from error
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start : error.start + 1]
        what = f"not UTF-8 text: the byte {byte.hex().upper()}"
        letter = byte.decode("cp1252", "replace")
        what += f", in Windows-1252 {letter!r}" if letter.isalpha() else ""
        raise UserError(f'{path}, line {line}: {what}; save the file as "CSV UTF-8"') from error
