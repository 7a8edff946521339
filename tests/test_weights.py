"""Recipes over tensors: every operation gives what numpy gives, for any rows and columns that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.families.passes import interleave_halves
from models.weights import Weights, concatenated, constant, stacked
from tests.checkpoints import quick

Array = NDArray[np.float32]


def array(*shape: int, start: int = 0) -> Array:
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def weights(*shape: int, start: int = 0) -> Weights:
    return constant("w", array(*shape, start=start))


# name: what is made, and the same by numpy
RECIPES: dict[str, tuple[Weights, Array]] = {
    "matrix": (weights(6, 4), array(6, 4)),
    "vector": (weights(6), array(6)),
    "picked": (weights(6, 4).pick(np.array([5, 0, 0, 3])), array(6, 4)[[5, 0, 0, 3]]),
    "every other row of a matrix in three": (
        (w := weights(3, 6, 4)).pick(w.grid[:, ::2]),
        array(3, 6, 4)[:, ::2],
    ),
    "outer dimensions swapped": (w.pick(w.grid.swapaxes(0, 1)), array(3, 6, 4).swapaxes(0, 1)),
    "a run of columns": (weights(6, 4).pick_columns(np.arange(1, 3)), array(6, 4)[:, 1:3]),
    "columns in another order": (weights(6, 4).pick_columns(np.array([3, 1, 1])), array(6, 4)[:, [3, 1, 1]]),
    "transposed": (weights(6, 4).transposed(), array(6, 4).T),
    "each of three transposed": (w.transposed(), array(3, 6, 4).swapaxes(1, 2)),
    "transposed columns": (weights(6, 4).transposed().pick_columns(np.array([5, 2])), array(6, 4).T[:, [5, 2]]),
    "columns transposed": (weights(6, 4).pick_columns(np.array([3, 0])).transposed(), array(6, 4)[:, [3, 0]].T),
    "longer rows": (weights(6, 4).reshaped(3, 8), array(3, 8)),
    "shorter rows": (weights(6, 4).reshaped(12, 2), array(12, 2)),
    "rows of another size": (weights(6, 4).reshaped(8, 3), array(8, 3)),
    "flat": (weights(6, 1, 4).reshaped(24), array(24)),
    "unflattened": (weights(24).reshaped(2, 3, -1), array(2, 3, 4)),
    "a column": (weights(6).reshaped(6, 1), array(6, 1)),
    "mapped": (weights(6, 4).mapped(lambda x: -np.exp(x / 9)), -np.exp(array(6, 4) / 9)),
    "concatenated": (
        concatenated([weights(2, 4), weights(3, 4, start=50)]),
        np.concatenate([array(2, 4), array(3, 4, start=50)]),
    ),
    "stacked": (stacked([weights(2, 4), weights(2, 4, start=50)]), np.stack([array(2, 4), array(2, 4, start=50)])),
    "stacked vectors": (stacked([weights(4), weights(4, start=9)]), np.stack([array(4), array(4, start=9)])),
    "stacked transposed": (
        stacked([weights(2, 4).transposed(), weights(2, 4, start=50).transposed()]),
        np.stack([array(2, 4).T, array(2, 4, start=50).T]),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_equals_numpy(name: str) -> None:
    made, expected = RECIPES[name]
    assert made.shape == expected.shape
    np.testing.assert_array_equal(made.values(), expected)


@pytest.mark.parametrize("name", RECIPES)
@quick
@given(data=st.data())
def test_any_rows_and_columns_can_be_read(name: str, data: Any) -> None:
    made, expected = RECIPES[name]
    matrix = expected.reshape(made.n_rows, made.row_length)
    rows = data.draw(st.lists(st.integers(0, made.n_rows - 1), min_size=1, max_size=8))
    start = data.draw(st.integers(0, made.row_length - 1))
    stop = data.draw(st.integers(start + 1, made.row_length))
    read = made.read(np.array(rows), slice(start, stop))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, matrix[rows, start:stop])


def test_two_halves_become_neighbouring_pairs() -> None:
    heads = interleave_halves(weights(12), 2)  # two heads of six rows
    assert heads.values().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleave_halves(weights(12, 2), 2).values()[:, 0].tolist() == (heads.values() * 2).tolist()


def test_what_is_exact_stays_exact_until_it_is_changed() -> None:
    assert weights(6, 4).pick(np.array([1])).transposed().dtype == "F32"
    assert weights(6, 4).mapped(np.negative).dtype is None
    assert concatenated([weights(2, 4), weights(2, 4).mapped(np.negative)]).dtype is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: stacked([weights(2, 4), weights(4, 2)]),
        lambda: concatenated([weights(2, 4), weights(2, 3)]),
        lambda: weights(2, 4).reshaped(3, 3),
    ],
)
def test_shapes_that_do_not_go_together(make: Callable[[], Weights]) -> None:
    with pytest.raises(ValueError, match="not"):
        make()
