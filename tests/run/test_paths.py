"""Tests of ``captioning/run/paths.py``."""

from pathlib import Path

import datasets
from captioning.run import paths as paths_room


def test_every_file_name_tells_what_it_is():
    name = datasets.base_name("flickr8k", 5, 5)
    assert name == "flickr8k_5_cap_per_img_5_min_word_freq"
    paths = [
        *(datasets.split_path("d", split, name) for split in datasets.SPLITS),
        datasets.word_map_path("d", name),
        paths_room.contact_sheet_path("d", name),
        paths_room.checkpoint_path("d", name),
        paths_room.checkpoint_path("d", name, best=True),
        paths_room.log_path("d", name),
        paths_room.curves_path("d", name),
        paths_room.features_path("d", name, "val", "k"),
        paths_room.captions_path("d", name, "val", 3),
        paths_room.metrics_path("d", name, "val"),
    ]
    assert len(set(paths)) == len(paths) and {path.parent for path in paths} == {Path("d")}
    assert (
        paths[0].name == f"TRAIN_{name}.hdf5" and paths[6].name == f"BEST_checkpoint_{name}.pth.tar"
    )
