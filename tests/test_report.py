"""The report in docs/: its tables are what its runs give, and a run can be taken in."""

import importlib.util
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets
import eval as evaluation
import models
import train
import utils
from captioning.report import metrics as metrics_room
from captioning.run import files, paths

ROOT = Path(utils.__file__).resolve().parent


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scripts = "report", "knowledge", "exposure", "ablations"
report, knowledge, exposure, ablations = map(script, scripts)
claims, tables = report.claims, report.report_tables
TEXTS = ["docs/runs.json", *report.PAGES]


@pytest.fixture
def copy(tmp_path):
    """The pages and runs.json in a folder of their own."""
    for name in TEXTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_report(folder, monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["report.py", "--folder", str(folder), *map(str, flags)])
    report.main()


def rows(page, table):
    """The lines of a page's table."""
    found = re.search(rf"<!-- {table} -->\n(.*?)<!-- end -->", page.read_text(), re.S)
    return found[1].splitlines()


def test_tables_and_plots_are_what_the_runs_give(copy, monkeypatch):
    run_report(copy, monkeypatch)
    for name in TEXTS:
        assert (copy / name).read_text() == (ROOT / name).read_text(), (
            "run docs/report.py and commit what it writes"
        )
    assert {path.stem for path in copy.glob("docs/*.png")} == set(report.report_plots.PLOTS)
    assert all((ROOT / "docs" / f"{name}.png").exists() for name in report.report_plots.PLOTS)


def test_every_table_stands_in_a_page():
    text = "".join((ROOT / name).read_text() for name in report.PAGES)
    assert all(f"<!-- {name} -->\n" in text for name in tables.TABLES)


def test_a_run_is_taken_in_with_its_options_and_scores(
    trained, best_checkpoint, training_data, copy, tmp_path, monkeypatch
):
    monkeypatch.setattr(metrics_room, "_meteor", lambda gts, res: None)
    for name in ("mine-seed0", "gru-seed2"):
        shutil.copytree(trained, tmp_path / name)
    (log,) = (tmp_path / "gru-seed2").glob("log_*.jsonl")
    text = log.read_text().replace('"encoder_weights": "none"', '"encoder_weights": "/a/b"')
    text = text.replace('"decoder": "lstm"', '"decoder": "transformer"')
    log.write_text(text.replace('"decoder_options": {}', '"decoder_options": {"layers": 3}'))
    folder = tmp_path / "mine-seed0"
    flags = f"--model {folder / best_checkpoint.name} --data_folder {training_data[0]}"
    flags += " --beam_size 1 5 --device cpu --max_decode_steps 8"
    evaluation.main(evaluation.get_args_parser().parse_args(flags.split()))
    before = rows(copy / "docs/experiments.md", "decoders in full")
    run_report(copy, monkeypatch, "--add", folder, tmp_path / "gru-seed2")

    runs = json.loads((copy / "docs/runs.json").read_text())
    run, other = runs["mine-seed0"], runs["gru-seed2"]
    assert (
        run["options"]["encoder_weights"] == "none" and other["options"]["encoder_weights"] == "b"
    )
    assert other["options"]["layers"] == 3 and "decoder_options" not in other["options"]
    assert run["options"]["encoder"] == "resnet18" and "data_folder" not in run["options"]
    assert [epoch["epoch"] for epoch in run["epochs"]] == [1, 2] and "torch" in run["machine"]
    assert run["parameters"] == sum(
        p.numel() for p in models.load_captioner(best_checkpoint).decoder.parameters()
    )
    metrics = files.read_json(paths.metrics_path(folder, training_data[1], "test"))
    assert run["test"]["beams"]["5"]["CIDEr"] == round(metrics["beam_sizes"]["5"]["CIDEr"], 4)

    page = copy / "docs/experiments.md"
    assert "* `python train.py --encoder resnet18 " in page.read_text()
    others = [row for row in rows(page, "others") if "mine" in row]
    assert [row.split(" | ")[:3] for row in others] == [
        ["| mine", "test", "1"],
        ["| mine", "test", "5"],
    ]
    # a run without scores stands in no table of scores
    assert rows(page, "decoders in full") == before


def test_runs_of_ones_own_get_a_table_and_curves_where_one_says(
    trained, copy, tmp_path, monkeypatch, capsys
):
    for name in ("wide-seed0", "wide-seed1", "gru-seed0"):
        shutil.copytree(trained, tmp_path / "sweep" / name)
    scored = {"split": "test", "length_penalty": 0.7, "people": {}}
    scored["beam_sizes"] = {"5": {"BLEU-1": 60.0, "BLEU-4": 21.5, "CIDEr": 50.25}}
    files.write_json(tmp_path / "sweep/wide-seed0/metrics_test_x.json", scored)
    compared = {"split": "test", "compared": {}}
    files.write_json(tmp_path / "sweep/gru-seed0/metrics_test_x_comparison_of_2.json", compared)
    before = {name: (copy / name).read_bytes() for name in TEXTS}
    folders = sorted((tmp_path / "sweep").iterdir())
    run_report(copy, monkeypatch, "--add", *folders, "--to", tmp_path / "out")
    said = capsys.readouterr().out
    assert "wide-seed0: 2 epochs; test scored with beam 5\n" in said
    assert "wide-seed1: 2 epochs\n" in said and "gru-seed0: 2 epochs\n" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"runs.md", "curves.png"}
    text = (tmp_path / "out/runs.md").read_text()
    assert text in said and "| gru | 1 |" in text and "| wide | 2 |" in text
    assert "| wide | test | 60.0 |" in text and "50.2" in text
    assert {name: (copy / name).read_bytes() for name in TEXTS} == before
    with pytest.raises(SystemExit, match="--to: expected --add"):
        run_report(copy, monkeypatch, "--to", tmp_path / "none")


def test_a_row_counts_more_than_two_seeds_and_leaves_out_what_is_not_there():
    scored = {"test": {"beams": {"5": {"CIDEr": 50.0}}}}
    runs = {"a-seed0": scored, "a-seed1": scored, "a-seed2": scored, "a-b-seed0": scored, "c": {}}
    table = tables.scores_table(runs, {"A": "a", "B": "b", "C": "c"}, ("CIDEr", "METEOR"))
    assert table.splitlines()[2:] == ["| A (3 seeds) | 50.0\xa0±\xa00.0 | – |"]
    assert tables.scores_table(runs, {"C": "c"}, above="said above a table") == ""


def test_a_gaze_is_shown_of_every_run_that_has_one():
    looked = {"val": {"beams": {"5": {"places": 18.14, "num_pixels": 64, "CIDEr": 47.0}}}}
    other = {"val": {"beams": {"5": {"CIDEr": 47.0}}}}
    table = tables.gaze_table({"new-seed0": looked, "new-seed1": looked, "other": other})
    assert "| new | validation | 18.1\xa0±\xa00.0 | 64 | – " in table and "other" not in table


def test_an_unknown_table_ends_in_one_line(copy, monkeypatch):
    page = copy / "docs/results.md"
    page.write_text("<!-- nonsense -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="nonsense.*expected one of encoders, decoders, "):
        run_report(copy, monkeypatch)


@pytest.mark.parametrize("page", report.PAGES)
def test_sentences_say_what_the_runs_say(page):
    runs = json.loads((ROOT / "docs/runs.json").read_text())
    assert claims.wrong_claims(runs, (ROOT / page).read_text()) == []


def test_every_figure_among_the_results_names_its_runs_or_its_source():
    assert list(claims.without_source((ROOT / "docs/results.md").read_text())) == [], (
        "say in a comment behind it where it is from, as docs/claims.py describes"
    )


def two_runs():
    """Two seeds of "a" and "b" each, and a run "one"."""
    scores = {"a-seed0": 50.0, "a-seed1": 52.0, "b-seed0": 48.6, "b-seed1": 52.4, "one": 51.0}
    runs = {k: {"test": {"beams": {"5": {"CIDEr": v}}}} for k, v in scores.items()}
    runs["a-seed0"] |= {"parameters": 1_500_000, "epochs": [{"epoch": 2, "nll": 2.5}]}
    return runs | {"xe-seed0": {"test": {"people": {"CIDEr": 79.25, "words used": 1507}}}}


@pytest.mark.parametrize(
    "claim",
    [
        "CIDEr: a = 51.0",
        "CIDEr: a = 51.0 ± 1.0",
        "CIDEr: a, b = 48.6 to 52.4",
        "CIDEr: a - b = 1.4 and -0.4",
        "CIDEr: a - b = 0.5",
        "CIDEr, test, beam 5: one / 2 = 25.5",
        "CIDEr: one > b-seed0",
        "CIDEr: a, b, one < people",
        "CIDEr: a overlaps b",
        "parameters: a / 1e6 = 1.5",
        "nll, epoch 2: a = 2.5",
        "words used: people = 1,507",
    ],
)
def test_a_true_sentence_holds(claim):
    text = "51.0 ± 1.0, 48.6 to 52.4, 1.4 and −0.4, 0.5, 25.5, 1.5, 2.5, 1,507"
    assert claims.wrong_claims(two_runs(), f"{text}\n<!-- holds\n{claim}\n-->\n") == []


@pytest.mark.parametrize(
    "claim, why",
    [
        ("CIDEr: a = 51.1", "the runs give 51"),
        ("CIDEr: a = 51.0 ± 0.9", "the runs give 51, 1"),
        ("CIDEr: a - b = -0.4 and 1.4", "the runs give 1.4, -0.4"),
        ("CIDEr: a, b = 50.0 to 52.4", "the runs give 48.6, 52.4"),
        ("CIDEr: a = 50.0, 52.0 and 53.0", "expected N, N ± N"),
        ("CIDEr: a > b", r"a: \[50.0, 52.0\], b: \[48.6, 52.4\]"),
        ("CIDEr: one overlaps b-seed0", "51.0.*48.6"),
        ("CIDEr: one = 51", "does not say 51"),
        ("CIDEr: c = 51.0", "no run 'c'"),
        ("METEOR: a = 51.0", "no run 'a'"),
        ("CIDEr, val: a = 51.0", "no run 'a'"),
        ("CIDEr, beams 3: a = 51.0", "expected val, test"),
        ("CIDEr: a -b = 0.5", "between runs"),
        ("CIDEr is 51.0", "expected COLUMN"),
        ("nll, epoch 3: a = 2.5", "no run 'a'"),
    ],
)
def test_a_wrong_sentence_is_found(claim, why):
    text = "51.0 ± 0.9, 51.1, −0.4, 1.4, 50.0, 52.4, 0.5"
    (found,) = claims.wrong_claims(two_runs(), f"{text}\n<!-- holds\n{claim}\n-->\n")
    assert re.search(why, found), found


def test_a_sentence_is_held_against_the_text_before_it_alone():
    page = "51.0\n<!-- holds\nCIDEr: a = 51.0\n-->\n50.0\n<!-- holds\nCIDEr: a = 51.0\n-->\n"
    assert len(claims.wrong_claims(two_runs(), page)) == 1
    assert len(claims.wrong_claims(two_runs(), page.replace("50.0", "\n## 51.0\n"))) == 1


@pytest.mark.parametrize("mark", ["holds CIDEr: a = 1.0\n", "hold\nCIDEr: a = 51.0\n"])
def test_a_comment_that_is_not_read_is_found(mark):
    (found,) = claims.wrong_claims(two_runs(), f"51.0\n<!-- {mark}-->\n")
    assert "expected <!-- holds" in found


def test_sentences_that_no_longer_hold_are_named_when_all_is_drawn(copy, monkeypatch):
    page = copy / "docs/guide.md"
    page.write_text("51.0\n<!-- holds\nCIDEr: resnet50 = 51.0\n-->\n")
    with pytest.raises(SystemExit, match="guide.md: CIDEr: resnet50 = 51.0: the runs give 59.5"):
        run_report(copy, monkeypatch)
    assert (copy / "docs/recipe.png").exists()


def test_figures_without_a_source_are_found():
    table = "| 2.5 |\n|---|\n<!-- x -->\n| 3.5 |\n<!-- end -->"
    page = f"A 1.5.\n\n{table}\n4.5\n<!-- from: b -->\n# 6\n5 %"
    assert list(claims.without_source(page)) == ["A 1.5.", "5 %"]


def test_a_figure_has_no_digit_that_its_spread_makes_worthless():
    assert tables.cell([2.0]) == "2.0" and tables.cell([None]) == "–"
    assert (
        tables.cell([22.4, 22.6]) == "22.5\xa0±\xa00.1"
        and tables.cell([72.6, 85.4]) == "79\xa0±\xa06"
    )
    assert (
        tables.cell([0.20, 0.22], 3) == "0.21\xa0±\xa00.01"
        and tables.cell([1, 2, 4]) == "2\xa0±\xa02"
    )


def test_words_of_a_kind_are_right_where_a_reference_has_them():
    references = [[["two", "dogs", "running"], ["a", "brown", "dog"]], [["a", "man", "sits"]]]
    captions = [["two", "brown", "dogs", "sitting"], ["a", "dog", "runs"]]
    found = knowledge.score_captions(references, captions)
    assert found["animals"] == (50, 100) and found["numbers"] == (100, 50)
    assert found["actions"] == (0, 50)


def test_genders_are_counted_where_people_agree():
    woman, man, both = ["a", "woman"], ["two", "men"], ["a", "man", "and", "a", "girl"]
    references = [[woman] * 3 + [man], [man] * 4 + [both], [woman, woman, both, both], [both] * 5]
    captions = [["a", "boy"], ["men"], ["a", "woman"], ["a", "lady"]]
    assert knowledge.genders(references, captions) == {"women": (1, 0, 1), "men": (1, 0, 1)}


def test_a_linear_probe_finds_what_features_show():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(200, 5)).astype(np.float32) for _ in range(3)]
    truth = [np.stack([f[:, 2] > 1, rng.random(200) < 0.2], axis=1) for f in features]
    shown, not_shown = knowledge.probe(features, truth)
    assert shown > 90 and not_shown < 50
    precision = knowledge.average_precision(
        np.array([0.9, 0.8, 0.1]), np.array([True, False, True])
    )
    assert precision == pytest.approx((1 + 2 / 3) / 2)


class ThreeCaptions:
    """Two pictures with two and one captions: <start> is 8, <end> 9."""

    captions = np.array([[8, 4, 5, 6, 9], [8, 6, 9, 0, 0], [8, 5, 4, 9, 0]], np.int32)
    caption_lengths, caption_offsets = np.array([5, 3, 4]), np.array([0, 2, 3])
    __len__ = lambda self: 2


def tiny_decoder():
    torch.manual_seed(0)
    config = dict.fromkeys((*models.ARCHITECTURE[1:], *models.DROPOUTS), 0)
    config |= {"decoder": "lstm", "attention": "soft", "deep_output": True, "decoder_options": {}}
    config |= {"encoder_dim": 6, "attention_dim": 4, "embed_dim": 4, "decoder_dim": 4}
    return models.build_decoder(config, 10).eval()


def test_exposure_is_measured_by_position():
    """After true words it is what validation measures; the first word has none before it."""
    decoder, features = tiny_decoder(), torch.randn(2, 4, 6)
    true, words = exposure.nll_by_position(decoder, ThreeCaptions(), features, 1.0)
    assert words.tolist() == [3, 3, 2, 1]
    expected = train.teacher_forced_nll(decoder, ThreeCaptions(), features, slice(None))
    assert true.sum() / words.sum() == pytest.approx(expected, rel=1e-5)
    own, words = exposure.nll_by_position(decoder, ThreeCaptions(), features, 0.0)
    assert words.tolist() == [3, 3, 2, 1]
    assert own[0] == pytest.approx(true[0]) and (own[1:] != true[1:]).all()


def test_pictures_without_a_caption_to_score_add_nothing_to_the_loss():
    class Longer(ThreeCaptions):
        """And 64 pictures before them whose captions are all too long."""

        caption_offsets = np.array([0] * 64 + [0, 2, 3])
        __len__ = lambda self: 66

    decoder, features = tiny_decoder(), torch.randn(66, 4, 6)
    expected = train.teacher_forced_nll(decoder, ThreeCaptions(), features[64:], slice(None))
    found = train.teacher_forced_nll(decoder, Longer(), features, slice(None))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def restored(monkeypatch):
    """After the test, what the variants of docs/ablations.py change is as it was."""
    for owner, name in (
        (models, "build_decoder"),
        (models.DecoderWithAttention, "init_hidden_state"),
        (models.DecoderWithAttention, "step"),
        (train, "build_optimizer"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    for table in (models.ATTENTIONS, models.ENCODERS):
        for name, entry in table.items():
            monkeypatch.setitem(table, name, entry)


@pytest.mark.parametrize("name", sorted(set(ablations.VARIANTS) - {"plain", "third_stage"}))
def test_a_variant_changes_the_training_and_can_be_trained(name, restored):
    """With --amp, from stored features, which are float16."""
    features = torch.linspace(-1, 2, 48).view(2, 4, 6).half()
    captions, lengths, index = datasets.collate(ThreeCaptions(), np.arange(2))
    inputs = features, torch.tensor(captions), lengths, torch.tensor(index)
    args = types.SimpleNamespace(learning_rate=0.1, weight_decay=0.1, fine_tune_encoder=False)

    def losses():
        decoder = tiny_decoder()
        captioner = types.SimpleNamespace(decoder=decoder, device=torch.device("cpu"))
        optimizer = train.build_optimizer(args, captioner)
        for group in optimizer.param_groups:
            group["lr"].fill_(group["peak_lr"])
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16):
                output = decoder(*inputs)
            loss, _ = models.caption_loss(output)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    plain = list(losses())
    assert list(losses()) == plain
    ablations.VARIANTS[name]()
    changed = list(losses())
    assert changed != plain and changed[-1] < changed[0] - 0.5


def test_a_resnet_without_its_last_stage_has_a_finer_grid(restored):
    images = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    assert models.Encoder("resnet18", "none")(images).shape == (1, 9, 512)
    ablations.VARIANTS["third_stage"]()
    assert models.Encoder("resnet18", "none")(images).shape == (1, 36, 256)
