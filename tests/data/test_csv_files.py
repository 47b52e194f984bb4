"""Tests of ``captioning/data/csv_files.py``: tables as spreadsheets and scripts save them."""

import pytest
from helpers import rows_of

EXPECTED = [("0.png", "train", ["Ein Hund; er läuft, 🐕", "a cat"]), ("1.png", "val", ["a |bird"])]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("always_quoted", [True, False])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_is_read_whatever_its_delimiter(delimiter, always_quoted, end, encoding, tmp_path):
    rows = [("image", "caption", "caption", "split")]
    rows += [(name, *[*texts, ""][:2], split) for name, split, texts in EXPECTED]
    quoted = lambda text: f'"{text}"' if always_quoted or delimiter in text else text
    text = end.join(delimiter.join(map(quoted, row)) for row in rows)
    found, notes = rows_of(tmp_path / "c.csv", text, encoding)
    assert found == EXPECTED and len(notes) == 1
    assert notes[0].endswith("c.csv has captions in the columns caption, caption")


@pytest.mark.parametrize(
    "header, captions",
    [
        ("image,caption,caption 2,caption_3", ["b", "c", "d"]),
        ("image,caption,caption,Caption", ["b", "c", "d"]),
        ("Photo,Description,Other,", ["b"]),
        ("image,caption,comments,caption_quality", ["b"]),
        ("File Name,Comment,comment_number,Comments", ["b", "d"]),
        ("img_path,sentence1,sentence2,sentence_ids", ["b", "c"]),
        ("path,texture,text-length,text", ["d"]),
        ("filepath,alt_text,caption_url,captioner", ["b"]),
    ],
)
def test_columns_are_known_by_their_names(header, captions, tmp_path):
    found, notes = rows_of(tmp_path / "c.csv", f"{header}\na.png,b,c,d\n")
    assert found == [("a.png", None, captions)] and len(notes) == (len(captions) > 1)


def test_a_list_in_a_cell_as_pandas_writes_it_is_a_list(tmp_path):
    text = """image,captions\na.png,"['a dog', ""the dog's bed""]"\nb.png,"['a', 'cat']"\n"""
    text += """c.png,"['a dog' ""the dog's bed""\n 'a cat']"\n"""  # as NumPy writes a list
    text += "c.png,[a] b\n"
    found, _ = rows_of(tmp_path / "c.csv", text)
    assert [captions for _, _, captions in found] == [
        ["a dog", "the dog's bed"],
        ["a cat"],
        ["a dog", "the dog's bed", "a cat"],
        ["[a] b"],
    ]


def test_a_row_may_have_fewer_captions_than_the_header(tmp_path, fails):
    text = "image;caption 1;caption 2;caption 3\na.png;b;c;d\nb.png;b\nc.png;;d;\nd.png;;;\n"
    found, _ = rows_of(tmp_path / "c.csv", text)
    assert [captions for _, _, captions in found] == [["b", "c", "d"], ["b"], ["d"], [""]]
    with fails("line 2: 1 fields, expected 3; put captions that hold semicolons in double quotes"):
        rows_of(tmp_path / "c.csv", "image;caption;caption\na.png\n")


def test_quotes_of_a_table_with_tabs_need_not_be_quotes(tmp_path):
    text = 'image\tcaption\na.png\t"Go" says a dog\nb.png\t5" long\nc.png\t"a cat"\n'
    found, _ = rows_of(tmp_path / "c.tsv", text)
    assert [caption for _, _, (caption,) in found] == ['"Go" says a dog', '5" long', "a cat"]
    text = 'image\tcaption\na.png\t"a ""dog"",\nit runs"\nb.png\ta cat\n'
    found, _ = rows_of(tmp_path / "c.tsv", text)
    assert [caption for _, _, (caption,) in found] == ['a "dog",\nit runs', "a cat"]
    text = 'image\tcaption\na.png\t"Go\nb.png\ta cat\nc.png\tand stop"\n'  # in two captions
    found, _ = rows_of(tmp_path / "c.tsv", text)
    assert [caption for _, _, (caption,) in found] == ['"Go', "a cat", 'and stop"']


@pytest.mark.parametrize(
    "line, header",
    [
        ("a.png,a dog", "image,caption"),
        ('a.png,"a dog, it runs",train', "image,caption,split"),
        ("0;Val;b/a.JPG;a dog;a cat", "number;split;image;caption;caption"),
        ("a.png\ta dog", "image<TAB>caption"),
    ],
)
def test_a_table_without_a_header_is_told_which_to_write(line, header, tmp_path, fails):
    with fails(f"c.csv has no header; write {header} above its first line"):
        rows_of(tmp_path / "c.csv", f"{line}\n" * 3)


def test_excels_line_above_a_table_is_passed_over(tmp_path, fails):
    found, _ = rows_of(tmp_path / "c.csv", "sep=;\r\nimage;caption\r\na.png;a dog\r\n")
    assert found == [("a.png", None, ["a dog"])]
    with fails("line 3: 1 fields, expected 2"):
        rows_of(tmp_path / "c.csv", "sep=;\nimage;caption\na.png\n")


@pytest.mark.parametrize("column", ["split", "Set", "subset", "partition"])
def test_the_columns_of_the_split(column, tmp_path):
    found, _ = rows_of(tmp_path / "c.csv", f"image,caption,{column}\na.png,b,dev\nb.png,c,\n")
    assert found == [("a.png", "val", ["b"]), ("b.png", None, ["c"])]


def test_a_set_that_is_no_split_is_another_column(tmp_path):
    found, _ = rows_of(tmp_path / "c.csv", "image,caption,set\na.png,b,flickr\n")
    assert found == [("a.png", None, ["b"])]


def test_marks_of_a_captions_start_and_end_are_no_words(tmp_path):
    text = "image,caption\na.png,<start> a dog <end> <pad>\nb.png,<S>a <5 m> dog</s>\n"
    found, _ = rows_of(tmp_path / "c.csv", text)
    assert [captions[0].split() for _, _, captions in found] == [
        ["a", "dog"],
        ["a", "<5", "m>", "dog"],
    ]
