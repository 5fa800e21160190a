"""The example that writes a network for digits as C."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import microcontroller as example

from tests.support.compiled import needs_gcc


@needs_gcc
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_the_c_source_gives_the_classes_of_what_the_device_computes(tmp_path):
    exported = example.written(example.DigitsClassifier(), tmp_path / "firmware")
    assert exported.files[0].parent == tmp_path / "firmware"
    images, _ = next(iter(example.loaders()[2]))
    assert (example.classes(exported, images) == exported.run(images).argmax(1)).all()
    assert example.header_number(exported, "DIGITS_OUTPUT_SIZE") == 10
