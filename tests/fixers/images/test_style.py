import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fixers.images.style import StyleTransfer, _analyse, _levels, _synthesise


def scenes(seed, count=8, size=32):
    """Smooth colourful backgrounds with a hard-edged shape."""
    generator = torch.Generator().manual_seed(seed)
    images = functional.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=size, mode="bilinear") * 0.5
    for image in images:
        top, left = torch.randint(size // 8, size // 2, (2,), generator=generator).tolist()
        image[:, top : top + size // 3, left : left + size // 3] += 0.4
    return (images + 0.01 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def corrupted(images):
    """Out of focus and tinted."""
    blurred = functional.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)
    return (
        blurred * torch.tensor([0.9, 0.5, 0.3])[:, None, None] + torch.tensor([0.1, 0.05, 0.0])[:, None, None]
    ).clamp(0, 1)


def statistics(images):
    flat = images.flatten(2)
    means = flat.mean(dim=2)
    centred = flat - means[..., None]
    return torch.cat([means, (centred @ centred.mT / flat.shape[2]).flatten(1)], dim=1)


def edges(images):
    """Gradients at a scale of two pixels; at one, the blur itself leaves a correlation of 0.45 with the sharp image."""
    grey = functional.avg_pool2d(images.mean(dim=1), 2)
    return torch.stack([grey[:, 1:, 1:] - grey[:, 1:, :-1], grey[:, 1:, 1:] - grey[:, :-1, 1:]], dim=1).flatten(1)


@pytest.mark.parametrize("backend", ["haar_wct", "adain_pixel"])
def test_the_look_is_the_references_and_the_edges_are_the_contents(backend):
    contents, references = scenes(0), corrupted(scenes(1))
    choice = torch.tensor([3, 3, 0, 1, 2, 5, 6, 7])
    styled = StyleTransfer(references, backend)(contents, choice)
    to_reference = (statistics(styled) - statistics(references[choice])).norm(dim=1)
    to_content = (statistics(styled) - statistics(contents)).norm(dim=1)
    assert (to_reference < 0.3 * to_content).all()
    for one, other in zip(edges(styled), edges(contents), strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.7


@settings(max_examples=30, deadline=None)
@given(height=st.integers(4, 37), width=st.integers(4, 37), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_the_wavelet_transform_loses_nothing(height, width, channels, seed):
    images = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(seed))
    levels = _levels(images.shape[-2:])
    bands = _analyse(images, levels)
    assert len(bands) == 1 + 3 * levels
    torch.testing.assert_close(_synthesise(bands, levels)[..., :height, :width], images)
    if height % 2**levels == width % 2**levels == 0:
        energy = sum(band.square().sum() for band in bands)
        torch.testing.assert_close(energy, images.square().sum())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 9, 13), (3, 5, 5)])
def test_statistics_of_the_bands_are_the_references(shape):
    generator = torch.Generator().manual_seed(0)
    # Far from 0 and 1, so that nothing is clipped.
    contents, references = (0.4 + 0.2 * torch.rand(6, *shape, generator=generator) for _ in range(2))
    references[:, :, : shape[1] // 2] += 0.1
    styled = StyleTransfer(references)(contents, torch.arange(6))
    if min(shape[1:]) % 2 == 0:
        levels = _levels(torch.Size(shape[1:]))
        for one, other in zip(_analyse(styled, levels), _analyse(references, levels), strict=True):
            torch.testing.assert_close(
                statistics(one)[:, shape[0] :], statistics(other)[:, shape[0] :], atol=2e-3, rtol=0.05
            )
    torch.testing.assert_close(statistics(styled), statistics(references), atol=0.02, rtol=0)


def test_every_image_gets_its_own_reference():
    references = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.9)]) + 0.01 * torch.rand(2, 3, 8, 8)
    styled = StyleTransfer(references)(scenes(0, size=8), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1]))
    assert styled.mean((1, 2, 3)).round(decimals=1).tolist() == pytest.approx([0.2, 0.9, 0.9, 0.2, 0.2, 0.9, 0.2, 0.9])


def test_strength_zero_changes_nothing_and_flat_images_dont_explode():
    contents = scenes(0)
    assert torch.equal(StyleTransfer(scenes(1), strength=0.0)(contents, torch.arange(8)), contents)
    flat = torch.full((8, 3, 32, 32), 0.5)
    styled = StyleTransfer(scenes(1))(flat, torch.arange(8))
    assert styled.isfinite().all()
    assert styled.std((2, 3)).max() < 1e-3
    # Slopes are left.
    assert StyleTransfer(flat)(contents, torch.arange(8)).std((2, 3)).max() < 0.25 * contents.std((2, 3)).max()
