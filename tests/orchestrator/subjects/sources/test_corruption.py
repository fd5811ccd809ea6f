"""Corrupted subjects: valid, repair and test are shifted, train isn't, and the original fails more."""

import numpy as np
import pytest
import torch

from analysis.contract.errors import UserError
from orchestrator.subjects.catalogue import catalogue, resolve
from orchestrator.subjects.sources.corruption import Corruption

KINDS = ("gaussian_noise", "gaussian_blur", "contrast", "brightness")


def subject(kind="gaussian_noise", severity=3, **more):
    return resolve({"name": "shifted", "dataset": "digits", "corruption": {"kind": kind, "severity": severity, **more}})


def images(split):
    return split.batch().inputs


@pytest.fixture(scope="module")
def clean():
    return catalogue()["digits"].load_data()


@pytest.mark.parametrize("kind", KINDS)
def test_train_is_clean_and_the_rest_is_shifted_more_by_more(clean, kind):
    data = [subject(kind, severity).load_data() for severity in (1, 5)]
    for shifted in data:
        assert torch.equal(images(shifted.train), images(clean.train))
    for name in ("valid", "repair", "test"):
        weak, strong = ((images(getattr(d, name)) - images(getattr(clean, name))).abs().mean() for d in data)
        assert 0 < weak < strong
        assert torch.equal(getattr(data[0], name).labels, getattr(clean, name).labels)


def test_noise_has_its_deviation_and_no_two_images_share_it(clean):
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((400, 1, 8, 8), 0.5)
    noise = Corruption("gaussian_noise", 1).apply(grey, generator) - grey
    assert noise.std().item() == pytest.approx(0.08, rel=0.03)
    assert len(np.unique(noise[:, 0, 0, 0].numpy())) == 400


def test_blur_keeps_a_constant_image_and_contrast_keeps_the_mean():
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((2, 3, 8, 8), 0.3)
    torch.testing.assert_close(Corruption("gaussian_blur", 5).apply(flat, generator), flat)
    varied = torch.rand(4, 1, 8, 8, generator=generator)
    lower = Corruption("contrast", 2).apply(varied, generator)
    torch.testing.assert_close(lower.mean(dim=(1, 2, 3)), varied.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(lower.std(dim=(1, 2, 3)), 0.3 * varied.std(dim=(1, 2, 3)))


def test_the_same_seed_gives_the_same_pixels_and_the_splits_say_what_was_done(clean):
    first, again, other = (subject(seed=seed).load_data() for seed in (1, 1, 2))
    assert torch.equal(images(first.test), images(again.test))
    assert not torch.equal(images(first.test), images(other.test))
    assert len({first.split_hash, other.split_hash, clean.split_hash}) == 3
    assert "gaussian_noise 3" in first.description


@pytest.mark.parametrize("wrong", [{"kind": "rain"}, {"kind": "contrast", "severity": 6}])
def test_what_does_not_exist_is_refused(wrong):
    with pytest.raises(UserError, match="corruption"):
        resolve({"name": "shifted", "dataset": "digits", "corruption": wrong})
