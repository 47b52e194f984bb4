"""Tests of ``captioning/data/finding.py``."""

import shutil
import zipfile
from pathlib import Path

import pytest
from helpers import encoded, save, save_pictures, shown, write_csv
from PIL import Image

import datasets
from captioning.data import finding
from captioning.data import pictures as pictures_room


def test_member_that_claims_an_absurd_size_is_not_read(tmp_path, fails, monkeypatch):
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(5001))
    monkeypatch.setattr(pictures_room, "MAX_BYTES", 5000)
    with fails("a.jpg as a picture: it is no regular file of at most 5,000 bytes"):
        datasets.open_image(finding.Pictures(path).find("a.jpg"))


@pytest.mark.parametrize(
    "name", ["../../climbs.jpg", "/climbs.jpg", "..\\climbs.jpg", "C:\\climbs.jpg"]
)
def test_archives_that_climb_out_are_read_in_place(name, tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "pictures.zip", "w") as archive:
        archive.writestr(name, encoded(Image.new("RGB", (9, 9), "red"), "PNG"))
    pictures = finding.Pictures(tmp_path / "in" / "pictures.zip")
    assert datasets.open_image(pictures.find(name)).size == (9, 9)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "pictures.zip"]


def test_a_link_in_an_archive_is_not_followed(tmp_path, fails):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        link = zipfile.ZipInfo("a.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path / "secret.png"))
    with fails("pictures.zip/a.jpg as a picture: not in a known format"):
        datasets.open_image(finding.Pictures(tmp_path / "pictures.zip").find("a.jpg"))


def test_members_with_a_wrong_checksum_or_an_unknown_compression_are_refused(tmp_path, fails):
    path = tmp_path / "pictures.zip"
    picture = encoded(Image.new("RGB", (99, 99), "red"), "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", picture)
    whole = path.read_bytes()
    start = whole.index(picture)
    path.write_bytes(whole[: start + 80] + bytes([whole[start + 80] ^ 1]) + whole[start + 81 :])
    with fails("cannot read .*pictures.zip/a.jpg as a picture: Bad CRC-32"):
        datasets.open_image(finding.Pictures(path).find("a.jpg"))
    entry = whole.rindex(b"PK\x01\x02")
    path.write_bytes(whole[: entry + 10] + b"\x63" + whole[entry + 11 :])
    with fails("cannot read .*pictures.zip/a.jpg as a picture: .*compression"):
        datasets.open_image(finding.Pictures(path).find("a.jpg"))
    for data in (b"", b"<html>", whole[:-30]):
        path.write_bytes(data)
        with fails("pictures.zip is not a whole zip archive"):
            finding.Pictures(path)


@pytest.mark.parametrize(
    "on_disk, listed, expected",
    [
        (["day/0.png", "night/0.png"], ["night/0.png", "day/0.png"], [1, 0]),
        (["a/0.png", "b/1.png"], ["x/y/pictures/a/0.png", "1.png"], [0, 1]),
        (["a/0.JPG", "a/1.jpeg"], ["a/0.jpg", "A/1"], [0, 1]),
        (["0", "0.png"], ["0", "0.png"], [0, 1]),
        (["Caf\u00e9.png", "u\u0308.png"], ["Cafe\u0301.png", "\u00fc.png"], [0, 1]),
        (["0.png", "a/0.png"], ["0.png", "./a/0.png"], [0, 1]),
    ],
)
def test_a_picture_is_found_by_the_end_of_its_path(on_disk, listed, expected, tmp_path):
    folder = save_pictures(tmp_path / "pictures", on_disk)
    shutil.make_archive(tmp_path / "pictures", "zip", folder)
    path = write_csv(tmp_path / "c.csv", [(name, "a dog") for name in listed])
    for images in (folder, tmp_path / "pictures.zip"):
        records, _ = datasets.custom_records(images, path, 0)
        assert [shown(record) for record in records] == expected


def test_a_picture_of_another_folder_is_not_taken(tmp_path, fails):
    folder = save_pictures(tmp_path / "pictures", ["night/0.png"])
    for name in ("day/0.png", "0.jpg"):
        with fails(f"1 of 1 pictures are missing in .*'{name}'"):
            datasets.custom_records(folder, write_csv(tmp_path / "c.csv", [(name, "a")]), 0)
    clips = [f"clip{c}/{i}.png" for c in (1, 2) for i in range(20)]
    folder = save_pictures(tmp_path / "clips", clips[:-1])
    rows = [(name, "a dog") for name in clips]
    records, notes = datasets.custom_records(folder, write_csv(tmp_path / "c.csv", rows), 0)
    assert [shown(record) for record in records] == list(range(39))
    assert any("'clip2/19.png' is missing" in note for note in notes)


def test_a_name_that_two_pictures_have_is_an_error_that_names_both(tmp_path, fails):
    folder = save_pictures(tmp_path / "pictures", ["a/0.png", "b/0.png"])
    with fails("'0.png' may be .*/(a|b)/0.png or .*/(a|b)/0.png"):
        datasets.custom_records(folder, write_csv(tmp_path / "c.csv", [("0.png", "a")]), 0)


@pytest.mark.parametrize("suffix", ["tar", "gztar"])
def test_a_tar_archive_is_to_be_unpacked(suffix, tmp_path, fails):
    folder = save_pictures(tmp_path / "pictures", ["0.png"])
    archive = Path(shutil.make_archive(tmp_path / "packed", suffix, folder))
    with fails("a tar archive.*unpack it"):
        datasets.custom_records(archive, write_csv(tmp_path / "c.csv", [("0.png", "a")]), 0)


def test_a_picture_in_place_of_its_folder_is_said(tmp_path, fails):
    folder = save_pictures(tmp_path / "pictures", ["0.png"])
    with fails("0.png is a picture .*give its folder"):
        datasets.custom_records(
            folder / "0.png", write_csv(tmp_path / "c.csv", [("0.png", "a")]), 0
        )


def test_files_folders_and_patterns_are_found_each_once_in_order(describe):
    for i, name in enumerate(("a.png", "b.jpg", "C.JPG", "sub/d.png", "sub/deep/e.png")):
        save(Path("pictures") / name, i)
    flags = ("pictures/b.jpg", "pictures", "pictures/**/*.png", Path("pictures/a.png").absolute())
    _, results = describe("--img", *flags, "--no_plot")
    assert [result["image"] for result in results] == [
        f"pictures/{name}" for name in ("b.jpg", "C.JPG", "a.png", "sub/d.png", "sub/deep/e.png")
    ]
    assert not Path("out").exists()


@pytest.fixture
def linked(tmp_path):
    """A folder of two pictures, one under two names, and links of folders, one to its parent."""
    folder = save_pictures(tmp_path / "pictures", ["0.png", "far/1.png"])
    (tmp_path / "elsewhere").mkdir()
    (folder / "far").rename(tmp_path / "elsewhere" / "far")
    (folder / "far").symlink_to(tmp_path / "elsewhere" / "far")
    (folder / "again.png").symlink_to("0.png")
    (folder / "near").symlink_to("far")
    (folder / "up").symlink_to(".")
    (folder / "further_up").symlink_to(tmp_path)
    (folder / "nothing").symlink_to("nowhere")
    (folder / "itself.png").symlink_to("itself.png")
    return folder


def test_through_links_each_picture_is_found_once(linked, describe):
    for flags in ((linked, "--recursive"), (f"{linked}/**/*.png",), (linked, f"{linked}/far")):
        _, results = describe("--img", *flags, "--no_plot")
        assert sorted(Path(result["image"]).resolve().name for result in results) == [
            "0.png",
            "1.png",
        ]


def test_a_picture_is_one_whatever_it_is_called_by(linked, tmp_path):
    names = ["again.png", "1.png", "near/1.png"]
    for name, expected in zip(names, [0, 1, 1]):
        records, notes = datasets.custom_records(
            linked, write_csv(tmp_path / "c.csv", [(name, "a dog")]), 0
        )
        assert [shown(record) for record in records] == [expected]
        assert notes[-1].startswith("1 picture of ")  # the other one has no caption
    assert finding.Pictures([linked, linked / "up"]).count == 2


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("**", ["a.png", "b/c.png", "b/d/e.png"]),
        ("**/*.png", ["a.png", "b/c.png", "b/d/e.png"]),
        ("b/**", ["b/c.png", "b/d/e.png"]),
        ("**/d/*.png", ["b/d/e.png"]),
        ("**/**/c.*", ["b/c.png"]),
        ("b/**/[!e].png", ["b/c.png"]),
        ("**/.h/*", [".h/f.png"]),
        ("*/*", ["b/c.png"]),
    ],
)
def test_patterns_are_those_of_a_shell(pattern, expected, tmp_path):
    folder = save_pictures(tmp_path / "p", ["a.png", "b/c.png", "b/d/e.png", ".h/f.png"])
    found = finding.find_pictures([f"{folder}/{pattern}"])
    assert [path.relative_to(folder).as_posix() for path in found] == expected


def test_the_home_folder_is_known_in_a_pattern_within_quotes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_pictures(tmp_path / "p", ["a.png"])
    assert finding.find_pictures(["~/p/*.png"]) == [tmp_path / "p" / "a.png"]


def test_missing_pictures_are_shown_beside_what_is_there(tmp_path, fails):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for name in ("__.jpg", "T_r.jpg"):
            archive.writestr(name, b"")
    data = (tmp_path / "p.zip").read_bytes()  # Windows packs names in its own encodings
    data = data.replace(b"__.jpg", "狗.jpg".encode("gbk"))
    (tmp_path / "p.zip").write_bytes(data.replace(b"T_r.jpg", "Tür.jpg".encode("latin-1")))
    path = write_csv(tmp_path / "c.csv", [("狗.jpg", "a dog"), ("Tür.jpg", "a door")])
    first, second = zipfile.ZipFile(tmp_path / "p.zip").namelist()
    assert "狗" not in first and "ü" not in second
    with fails(
        f"2 of 2 pictures are missing .*'狗.jpg', 'Tür.jpg'; .*It has '{first}', '{second}'"
    ):
        datasets.custom_records(tmp_path / "p.zip", path, 0)


def test_pictures_in_hidden_folders_are_left_out(tmp_path, capsys):
    """Thumbnails would give every picture a second time."""
    save_pictures(tmp_path, ["a.png", ".thumbnails/a.png", "sub/.cache/b.png", "sub/b.png"])
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = finding.find_pictures([str(tmp_path)], recursive=True)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.png", "sub/b.png"]
    assert "2 hidden files" in capsys.readouterr().err
    assert len(finding.find_pictures([str(tmp_path)])) == 1
    some = lambda *patterns: finding.find_pictures([f"{tmp_path}/{p}" for p in patterns], True)
    assert some("s*") == [tmp_path / "sub/b.png"] and len(some("*")) == 2
    assert "1 broken link" in capsys.readouterr().err
