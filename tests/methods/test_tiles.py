"""Tiles: where they are cut, what normalising takes from them, and what is left of their colours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.views.draws import Draws
from methods.views.tiles import cut_tiles, greyscale, standardise, without_green_magenta

ROWS = 400


def draws(rows=ROWS, seed=0):
    return Draws.of(seed, 0, torch.arange(rows))


def coordinates(rows, height, width):
    """Images whose pixels hold their own row and column: (rows, 2, height, width)."""
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(grid).float().expand(rows, -1, -1, -1)


def corners(rows, *, cell, tile, grid=3, **settings):
    """First row and column of each tile within its cell, (rows, grid, grid, 2)."""
    tiles = cut_tiles(coordinates(rows, grid * cell, grid * cell), draws(rows), grid=grid, tile=tile, **settings)
    place = tiles[..., 0, 0].unflatten(1, (grid, grid)).clone()
    place[..., 0] -= cell * torch.arange(grid)[:, None]
    place[..., 1] -= cell * torch.arange(grid)
    return place.long()


class TestCutting:
    def test_tiles_without_room_are_the_cells_row_by_row(self):
        images = torch.rand(2, 3, 6, 9)
        tiles = cut_tiles(images[..., :6], draws(2), grid=3, tile=2)
        for i in range(3):
            for j in range(3):
                assert torch.equal(tiles[:, 3 * i + j], images[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])

    @given(seed=st.integers(0, 2**31), grid=st.integers(1, 3), cell=st.integers(1, 9), data=st.data())
    @settings(max_examples=50, deadline=None)
    def test_a_tile_is_a_piece_of_its_own_cell(self, seed, grid, cell, data):
        tile = data.draw(st.integers(1, cell))
        gap = data.draw(st.integers(0, cell - tile))
        images = coordinates(5, grid * cell, grid * cell)
        tiles = cut_tiles(images, draws(5, seed), grid=grid, tile=tile, gap=gap).long()
        inside = tiles - tiles[..., :1, :1]
        assert (inside[:, :, 0] == torch.arange(tile)[:, None]).all() and (inside[:, :, 1] == torch.arange(tile)).all()
        number = torch.arange(grid**2)
        assert (tiles[:, :, 0] // cell == (number // grid)[:, None, None]).all()
        assert (tiles[:, :, 1] // cell == (number % grid)[:, None, None]).all()

    @pytest.mark.parametrize(("gap", "places"), [(0, 5), (1, 4), (4, 1)])
    def test_every_place_is_equally_frequent_and_cells_and_axes_are_drawn_apart(self, gap, places):
        place = corners(2000, cell=10, tile=6, gap=gap).flatten(1)
        assert place.max() == places - 1
        share = torch.stack([(place == value).float().mean(dim=0) for value in range(places)])
        assert (share - 1 / places).abs().max() < 0.06
        if places > 1:
            correlation = torch.corrcoef(place.T.float()).fill_diagonal_(0)
            assert correlation.abs().max() < 0.1

    def test_published_tiles_are_1_to_41_pixels_apart_and_21_on_average(self):
        place = corners(300, cell=85, tile=64, gap=1)
        assert place.max() == 20
        steps = (place[:, 1:, :, 0] - place[:, :-1, :, 0]).flatten(), (place[..., 1:, 1] - place[..., :-1, 1]).flatten()
        apart = 21.0 + torch.cat(steps)
        assert apart.min() == 1 and apart.max() == 41 and apart.mean().item() == pytest.approx(21, abs=0.5)

    def test_an_image_mirrored_before_cutting_has_mirrored_tiles_in_mirrored_cells(self):
        images = torch.rand(2, 3, 12, 12)
        tiles, mirrored = (cut_tiles(x, draws(2), grid=3, tile=4) for x in (images, images.flip(3)))
        order = torch.arange(9).unflatten(0, (3, 3)).flip(1).flatten()
        assert torch.equal(mirrored, tiles[:, order].flip(4))

    def test_where_an_image_sits_in_the_batch_does_not_matter(self):
        images, order = torch.rand(6, 3, 12, 12), torch.randperm(6)
        tiles = cut_tiles(images, draws(6), grid=2, tile=4)
        assert torch.equal(cut_tiles(images[order], draws(6)[order], grid=2, tile=4), tiles[order])

    def test_what_does_not_fit_in_a_cell_is_refused(self):
        images = torch.rand(1, 3, 12, 12)
        with pytest.raises(ValueError, match="tile = 5: larger than a cell of 4 x 4"):
            cut_tiles(images, draws(1), grid=3, tile=5)
        with pytest.raises(ValueError, match=r"gap = 2: must be in \[0, 1\]"):
            cut_tiles(images, draws(1), grid=3, tile=3, gap=2)


class TestNormalising:
    @given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 1), shift=st.floats(-1, 1))
    @settings(deadline=None)
    def test_a_tile_has_mean_0_and_deviation_1_whatever_its_light(self, seed, scale, shift):
        tiles = torch.rand(4, 9, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
        normal = standardise(scale * tiles + shift)
        assert normal.mean(dim=(2, 3, 4)).abs().max() < 1e-5
        assert (normal.std(dim=(2, 3, 4), correction=0) - 1).abs().max() < 1e-4
        torch.testing.assert_close(normal, standardise(tiles), atol=1e-4, rtol=0)

    def test_each_tile_has_its_own_light_taken_away(self):
        tiles = torch.rand(2, 9, 3, 5, 5)
        light = torch.rand(2, 9, 1, 1, 1)
        torch.testing.assert_close(standardise(tiles * (0.5 + light) + light), standardise(tiles), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
    def test_a_constant_tile_stays_finite_and_almost_0(self, level):
        assert standardise(torch.full((2, 3, 8, 8), level)).abs().max() < 1e-3

    def test_mean_and_deviation_are_of_all_three_channels_together(self):
        tile = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), torch.full((2, 2), 2.0)])
        assert standardise(tile)[:, 0, 0].tolist() == pytest.approx([-1.224745, 0, 1.224745], abs=1e-6)  # ±√1.5


class TestColours:
    def test_grey_is_luma_in_three_channels_of_the_named_images_only(self):
        images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.4, 0.6]])[:, :, None, None]
        grey = greyscale(images, torch.tensor([True, True, True, False]))
        for row, luma in enumerate((0.299, 0.587, 0.114)):
            assert grey[row].flatten().tolist() == pytest.approx([luma] * 3)
        assert torch.equal(grey[3], images[3])

    def test_the_projection_is_symmetric_and_idempotent_and_has_trace_2(self):
        eye = torch.eye(3, dtype=torch.float64)[:, :, None, None]
        matrix = without_green_magenta(eye, torch.ones(3, dtype=torch.bool))[..., 0, 0].T
        expected = [0.833333, 0.333333, -0.166667, 0.333333, 0.333333, 0.333333, -0.166667, 0.333333, 0.833333]
        assert matrix.flatten().tolist() == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(matrix, matrix.T)
        torch.testing.assert_close(matrix @ matrix, matrix)
        assert matrix.trace().item() == pytest.approx(2)
        assert (matrix @ torch.tensor([-1.0, 2, -1]).double()).abs().max() < 1e-12

    def test_greys_and_colours_of_the_plane_stay_and_green_becomes_a_third_of_white(self):
        colours = torch.tensor([[80.0, 80, 80], [30, 60, 90], [0, 255, 0]], dtype=torch.float64)[:, :, None, None]
        found = without_green_magenta(colours, torch.ones(3, dtype=torch.bool))[..., 0, 0]
        torch.testing.assert_close(found, torch.tensor([[80.0, 80, 80], [30, 60, 90], [85, 85, 85]]).double())

    def test_only_the_named_images_are_projected_and_no_shift_along_green_magenta_is_seen(self):
        images = torch.rand(4, 3, 5, 5, dtype=torch.float64)
        which = torch.tensor([True, False, True, False])
        shifted = images + torch.rand(4, 1, 5, 5).double() * torch.tensor([-1.0, 2, -1])[:, None, None]
        found = without_green_magenta(images, which)
        assert torch.equal(found[~which], images[~which])
        torch.testing.assert_close(without_green_magenta(shifted, which)[which], found[which])
