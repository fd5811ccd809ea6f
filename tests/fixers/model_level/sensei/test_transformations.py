import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixers import TensorSplit
from fixers.model_level.sensei.transformations import Transformations, TransformedSplit


def images(count=3, channels=2, height=7, width=9, seed=0):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def one(gene):
    return torch.full((3, 1), gene)


def test_genes_of_zero_change_no_bit():
    every = Transformations(30.0, 0.1, 0.1, 0.1, 0.2, 0.3, 0.4, 1.0)
    pixels = images()
    assert torch.equal(every(pixels, torch.zeros(3, 8)), pixels)
    some = torch.zeros(3, 8)
    some[1, 0] = 0.5
    moved = every(pixels, some)
    assert torch.equal(moved[[0, 2]], pixels[[0, 2]])
    assert not torch.equal(moved[1], pixels[1])


def test_each_transformation_is_what_its_name_says():
    pixels = images()
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(Transformations(rotation=180.0)(pixels, one(1.0)), pixels.flip(-1, -2), **close)
    torch.testing.assert_close(Transformations(flip=1.0)(pixels, one(-0.3)), pixels.flip(-1), **close)
    torch.testing.assert_close(Transformations(flip=1.0)(pixels, one(0.3)), pixels, **close)
    # A displacement of whole pixels is a shift, and what comes in is black.
    shifted = Transformations(move_x=2 / 9)(pixels, one(1.0))
    torch.testing.assert_close(shifted[..., :-2], pixels[..., 2:], **close)
    assert (shifted[..., -2:].abs() < 1e-5).all()
    shifted = Transformations(move_y=3 / 7)(pixels, one(-1.0))
    torch.testing.assert_close(shifted[..., 3:, :], pixels[..., :-3, :], **close)
    torch.testing.assert_close(Transformations(brightness=0.4)(pixels, one(-0.5)), (pixels - 0.2).clamp(0, 1), **close)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(Transformations(contrast=0.5)(pixels, one(-1.0)), mean + 0.5 * (pixels - mean), **close)


def test_rotation_is_by_degrees_whatever_the_shape():
    square = images(height=7, width=7)
    turned = Transformations(rotation=90.0)(square, one(1.0))
    back = Transformations(rotation=90.0)(square, one(-1.0))
    expected = [torch.rot90(square, k, (-2, -1)) for k in (1, 3)]
    assert any(torch.allclose(turned, other, atol=1e-5) for other in expected)
    torch.testing.assert_close(torch.rot90(turned, 2, (-2, -1)), back, rtol=0, atol=1e-5)
    # In a wide image a small square in the middle turns into a square, not a rhomboid.
    wide = torch.zeros(3, 1, 9, 21)
    wide[..., 3:6, 9:12] = 1.0
    torch.testing.assert_close(Transformations(rotation=90.0)(wide, one(1.0)), wide, rtol=0, atol=1e-5)


def test_zoom_and_shear_keep_the_centre():
    dot = torch.zeros(3, 1, 9, 9)
    dot[..., 4, 4] = 1.0
    for transformations in (Transformations(zoom=0.5), Transformations(shear=0.5)):
        result = transformations(dot, one(1.0))
        assert (result[..., 4, 4] > 0.999).all()
    filled = torch.zeros(3, 1, 9, 9)
    filled[..., 3:6, 3:6] = 1.0
    assert (Transformations(zoom=0.5)(filled, one(1.0)).sum((1, 2, 3)) > filled.sum((1, 2, 3))).all()
    assert (Transformations(zoom=0.5)(filled, one(-1.0)).sum((1, 2, 3)) < filled.sum((1, 2, 3))).all()
    column = torch.zeros(3, 1, 9, 9)
    column[..., 4] = 1.0
    sheared = Transformations(shear=0.5)(column, one(1.0))
    # Two rows above and below the middle it has moved by a pixel, to opposite sides.
    sides = {int(sheared[0, 0, row].max(0).indices) for row in (2, 6)}
    assert sides == {3, 5}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_pixels_stay_in_range(seed):
    every = Transformations(180.0, 0.5, 0.5, 1.0, 0.9, 1.0, 1.0, 1.0)
    genes = 2 * torch.rand(3, 8, generator=torch.Generator().manual_seed(seed)) - 1
    result = every(images(seed=seed), genes)
    assert result.shape == (3, 2, 7, 9)
    assert ((result >= 0) & (result <= 1)).all()


def test_a_range_of_zero_has_no_gene():
    assert Transformations(rotation=5.0, zoom=0.1).names == ("rotation", "zoom")
    assert Transformations().names == ()


def test_a_transformed_split_has_its_images_variants():
    pixels, labels = images(), torch.tensor([2, 0, 1])
    split = TensorSplit(pixels, labels)
    transformations = Transformations(rotation=20.0, brightness=0.1)
    genes = torch.tensor([[0.5, 1.0], [0.0, 0.0], [-1.0, 0.2]])
    whole = TransformedSplit(split, transformations, genes)
    assert whole.shape == split.shape
    assert torch.equal(whole.labels, labels)
    expected = transformations(pixels, genes)
    some = whole.select(torch.tensor([2, 1]))
    assert torch.equal(some.labels, torch.tensor([1, 0]))
    assert torch.equal(some.batch().inputs, expected[[2, 1]])
