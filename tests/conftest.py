import numpy as np
import pytest
import torch
from PIL import Image

from darts_min import draw

torch.set_num_threads(1)  # the tests' tensors are small; more threads only slow them down
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def small_pictures(request, monkeypatch):
    """Let scripts draw at a quarter of the resolution: that is most of the time of a tiny run."""
    if request.module.__name__ not in ("test_draw", "test_report"):
        monkeypatch.setattr(draw, "SCALE", 1)
        monkeypatch.setattr(draw, "PIXELS", 1)


@pytest.fixture
def pictures(tmp_path):
    """The flags for a folder of noise: 12 training and 4 test images of each of three classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name in ("ant", "bee", "cow"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return ["--dataset", "folder", "--data-dir", f"{tmp_path}/pictures", "--batch-size", "4"]
