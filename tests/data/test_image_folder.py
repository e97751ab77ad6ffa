from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.data.image_folder import image_folder

PIL = pytest.importorskip("PIL.Image")
GREY = {"num_channels": 1, "image_size": 8}


def write(folder: Path, name: str, array: numpy.ndarray) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(array.astype("uint8")).save(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = numpy.random.default_rng(0)
    for label in ("dog", "cat"):
        for number in range(2):
            write(tmp_path, f"{label}/{number}.png", generator.integers(0, 256, (8, 8)))
    write(tmp_path, "cat/wide.png", generator.integers(0, 256, (20, 30, 3)))
    return tmp_path


def test_images_become_what_the_model_takes(folder: Path) -> None:
    found = image_folder(folder, GREY)
    assert found.classes == ("cat", "dog") and found.images.shape == (5, 1, 8, 8)
    assert found.labels.tolist() == [0, 1, 0, 1, 0], "classes in turns"
    assert -1 <= float(found.images.min()) < 0 < float(found.images.max()) <= 1
    exact = numpy.asarray(PIL.open(folder / "cat" / "0.png"), dtype="float32") / 127.5 - 1
    torch.testing.assert_close(found.images[0, 0], torch.from_numpy(exact))
    colour = image_folder(folder, {"num_channels": 3, "image_size": [6, 4]})
    assert colour.images.shape == (5, 3, 6, 4)
    batches = list(found.calibration(batch_size=2))
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]


def test_wrong_folders_are_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        image_folder(folder / "nothing", GREY)
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no images"):
        image_folder(folder, GREY)
    (folder / "empty").rmdir()
    (folder / "cat" / "broken.png").write_text("no image")
    with pytest.raises(InputError, match="no image"):
        image_folder(folder, GREY)
    with pytest.raises(InputError, match="one class"):
        write(folder, "../single/only/0.png", numpy.zeros((8, 8)))
        image_folder(folder.parent / "single", GREY)
