"""What prepares images and sound: a folder whose processor cannot be used says what to do."""

from __future__ import annotations

import pytest

from liar_ext import InputError
from liar_ext.calibration.media import feature_extractor, image_processor


@pytest.mark.parametrize("made", [image_processor, feature_extractor])
@pytest.mark.parametrize("text", ["{", "{}", '{"image_processor_type": "Nonsense"}'])
def test_a_processor_that_is_none_is_to_be_copied_again(tmp_path, made, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"its processor is not usable \(.*\); copy prepro") as it:
        made(tmp_path)
    assert str(it.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(it.value)
