"""What an evaluation leaves: captions, each picture's own scores, and a page."""

from captioning.report import page, tables
from captioning.run.files import write_csv, write_json
from captioning.run.messages import progress


def write_captions(data, scored, path):
    """Write captions in COCO's results format, with each picture's own scores.

    :param scored: as :func:`picture_rows` takes it
    """
    write_json(path, list(picture_rows(data, scored)))


def picture_rows(data, scored):
    """A dict for each picture: ``image_id``, ``file_name``, ``caption`` and its own scores.

    The ids are the source's if all pictures have one, else row numbers.

    :param scored: (captions, hypotheses or None, own scores): lists of all pictures, a dict of them
    """
    captions, hypotheses, own = scored
    ids = range(len(data)) if None in data.image_ids else data.image_ids
    for i, (number, name, words) in enumerate(zip(ids, data.image_names, captions)):
        row = {"image_id": number, "file_name": name, "caption": " ".join(words)}
        row |= {metric: round(scores[i], 2) for metric, scores in own.items()}
        row["words"] = len(words)
        row["log_prob"] = round(hypotheses[i].log_prob, 4) if hypotheses else None
        yield row


def write_scores(data, said, heading, path):
    """Write each picture's own scores as CSV: a row for each picture and column of the table.

    :param said: dict: for each label what :func:`picture_rows` takes
    :param heading: of the column that holds the label
    """
    rows = [{heading: k} | row for k, part in said.items() for row in picture_rows(data, part)]
    write_csv(path, rows)


def report_page(data, table, said, lead, side):
    """The report as ``page.write_page`` wants it.

    :param table: list of the tables of figures: dicts of "title", "columns" and "rows"
    :param said: dict: for each label of a caption what :func:`picture_rows` takes
    :param side: of the pictures, in pixels
    """
    pictures = []
    for i in progress(range(len(data)), desc="page", unit="picture"):
        others, captions = [texts[i] for texts, _, _ in said.values()], []
        for label, (texts, hypotheses, own) in said.items():
            scores = {name: f"{values[i]:.1f}" for name, values in own.items()}
            more = {"label": label, "differs": tables.differing(texts[i], others)}
            more = more if len(said) > 1 else {}
            hypothesis = hypotheses[i] if hypotheses else None
            captions.append(page.page_caption(texts[i], hypothesis, scores, **more))
        entry = {"name": data.image_names[i], "references": data.raw_references[i]}
        picture = page.page_picture(data.images([i])[0].transpose(1, 2, 0), side)
        pictures.append(entry | {"captions": captions} | picture)
    return {"title": "What was said", "lead": lead, "tables": table, "pictures": pictures}
