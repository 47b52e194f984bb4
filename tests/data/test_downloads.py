"""Tests of ``captioning/data/downloads.py``."""

import contextlib
import hashlib
import http.server
import threading
import time

import numpy as np
import pytest

from captioning.data import downloads

ARCHIVE = np.random.default_rng(0).bytes(300_000)


def serve(behaviour):
    """A server on 127.0.0.1 that answers request n with ``behaviour(handler, n, start)``.

    :return: context manager of (its address, list of the first byte asked for in each request)
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            asked.append(start)
            with contextlib.suppress(ConnectionError):
                if behaviour(self, len(asked), start) is None:
                    answer(self, start)

        def log_message(self, *_):
            pass

    @contextlib.contextmanager
    def running():
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()
            server.server_close()

    return running()


def answer(handler, start, status=None, length=None, body=None, kind="application/zip", **headers):
    handler.send_response(status or (206 if start else 200))
    handler.send_header("Content-Type", kind)
    if length != "none":
        handler.send_header(
            "Content-Length", str(len(ARCHIVE) - start if length is None else length)
        )
    if start and "Content_Range" not in headers:
        handler.send_header("Content-Range", f"bytes {start}-{len(ARCHIVE) - 1}/{len(ARCHIVE)}")
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(ARCHIVE[start:] if body is None else body)
    return True


def download(folder, address, **options):
    archives = {"a.zip": (hashlib.md5(ARCHIVE).hexdigest(), len(ARCHIVE))}
    # a busy machine may let a server of its own wait for a second
    patience = {"timeout": 3, "pause": 0.01}
    downloads.download(folder, ["a.zip"], address, archives, **patience | options)


def stall(handler, start):
    answer(handler, start, body=ARCHIVE[start : start + 9000])
    handler.wfile.flush()
    time.sleep(4)
    return True


@pytest.mark.parametrize(
    "name, behaviour, starts",
    [
        ("well", lambda h, n, s: None, [0]),
        (
            "break",
            lambda h, n, s: n < 3 and answer(h, s, body=ARCHIVE[s : s + 100_000]) or None,
            [0, 100_000, 200_000],
        ),
        ("stall", lambda h, n, s: n == 1 and stall(h, s) or None, [0, 9000]),
        (
            "error",
            lambda h, n, s: n == 1 and answer(h, s, 503, body=b"busy", length=4) or None,
            [0, 0],
        ),
        ("no length", lambda h, n, s: answer(h, s, length="none"), [0]),
        ("no ranges", lambda h, n, s: answer(h, 0, 200, body=ARCHIVE[: n * 150_000]), [0, 150_000]),
        (
            "other range",
            lambda h, n, s: s and answer(h, 5, 206) or n == 1 and answer(h, 0, body=b"PK") or None,
            [0, 2, 0],
        ),
        ("garbled", lambda h, n, s: n == 1 and answer(h, s, body=ARCHIVE[::-1]) or None, [0, 0]),
        (
            "too short",
            lambda h, n, s: n == 1 and answer(h, s, length=50_000, body=ARCHIVE[:50_000]) or None,
            [0, 0],
        ),
        (
            "redirect",
            lambda h, n, s: n < 3 and answer(h, s, 302, length=0, body=b"", Location="/x") or None,
            [0, 0, 0],
        ),
    ],
)
def test_download_survives(name, behaviour, starts, tmp_path):
    with serve(behaviour) as (address, asked):
        download(tmp_path, address)
        assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
        assert (tmp_path / "a.zip").read_bytes() == ARCHIVE
        assert asked == starts


@pytest.mark.parametrize(
    "name, behaviour, message",
    [
        (
            "HTML",
            lambda h, n, s: answer(h, 0, 200, body=b"<html>", length=6, kind="text/html"),
            "web page instead",
        ),
        ("HTML as zip", lambda h, n, s: answer(h, 0, 200, body=b"<html>", length=6), "MD5"),
        ("missing", lambda h, n, s: answer(h, 0, 404, body=b"", length=0), "404"),
        (
            "redirects for ever",
            lambda h, n, s: answer(h, 0, 302, body=b"", length=0, Location=f"/{n}"),
            "redirect",
        ),
        (
            "claims too much",
            lambda h, n, s: answer(h, 0, 200, length=10**15),
            "000,000,000,000 bytes, expected about",
        ),
        (
            "sends too much",
            lambda h, n, s: answer(h, 0, 200, length="none", body=ARCHIVE * 9),
            "more than 600,000 bytes",
        ),
        (
            "lies about length",
            lambda h, n, s: answer(h, 0, 200, length=400_000),
            "broke after 300,000 of 400,000",
        ),
        ("stalls", lambda h, n, s: stall(h, s), "timed out"),
        (
            "no HTTP",
            lambda h, n, s: h.wfile.write(b"\xff\xfe nonsense\r\n\r\n") and True,
            "cannot download",
        ),
    ],
)
def test_download_that_fails_says_what_to_do_by_hand(name, behaviour, message, tmp_path, fails):
    with serve(behaviour) as (address, asked), fails(f"{message}.*put a.zip into .* by hand"):
        download(tmp_path, address, attempts=2)
    assert not (tmp_path / "a.zip").exists()
    assert len(asked) <= 40
    if name == "missing":
        assert len(asked) == 1


def test_download_continues_an_earlier_run(tmp_path, fails):
    broken = serve(lambda h, n, s: answer(h, s, body=ARCHIVE[s : s + 60_000]))
    with broken as (address, _), fails("to continue"):
        download(tmp_path, address, attempts=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip.part"]
    with serve(lambda h, n, s: None) as (address, asked):
        download(tmp_path, address)
    assert asked == [60_000] and (tmp_path / "a.zip").read_bytes() == ARCHIVE


def test_download_finished_but_for_its_name(tmp_path):
    (tmp_path / "a.zip.part").write_bytes(ARCHIVE)
    with serve(lambda h, n, s: answer(h, 0, 416, body=b"", length=0)) as (address, asked):
        download(tmp_path, address)
    assert asked == [len(ARCHIVE)] and (tmp_path / "a.zip").read_bytes() == ARCHIVE


def test_no_server_at_all(tmp_path, fails):
    with fails("Connection refused.*by hand"):
        download(tmp_path, "http://127.0.0.1:9/", attempts=2)
