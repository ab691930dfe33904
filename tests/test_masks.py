"""Masks: every cell of the table against the rule that the method states."""

import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.ops import masks

VARIANTS = [(None, 0), (1, 0), (2, 0), (2, 1), (1, 2), (3, 5)]


def in_sight(query, key, window, sink):
  """Whether a query's chunk reaches back to a history chunk."""
  return window is None or query - key <= window or key < sink


@pytest.mark.parametrize(("window", "sink"), VARIANTS)
def test_two_streams_cell_by_cell(window, sink):
  n = 6
  table = masks.chunk_table(masks.history_mask(2, window, sink), n, 2)
  assert table.shape == (2 * n, 2 * n)
  for q in range(n):
    for k in range(n):
      near = in_sight(q, k, window, sink)
      # History sees history up to itself, and never the noisy stream.
      assert table[q, k] == (k <= q and near)
      assert not table[q, n + k]
      # A noisy chunk sees strictly earlier history, and itself.
      assert table[n + q, k] == (k < q and near)
      assert table[n + q, n + k] == (k == q)


@pytest.mark.parametrize(("window", "sink"), VARIANTS)
def test_one_stream_cell_by_cell(window, sink):
  n = 5
  table = masks.chunk_table(masks.history_mask(1, window, sink), n, 1)
  for q in range(n):
    for k in range(n):
      assert table[q, k] == (k <= q and in_sight(q, k, window, sink))


def test_masks_compose_as_their_conjunction():
  first, second = masks.BlockCausal(), masks.Window(1)
  both = masks.chunk_table(first & second, 4, 1)
  expected = masks.chunk_table(first, 4, 1) & masks.chunk_table(second, 4, 1)
  np.testing.assert_array_equal(both, expected)
  thrice = masks.chunk_table(first & second & masks.Window(3, 1), 4, 1)
  np.testing.assert_array_equal(thrice, both)


def test_no_row_is_empty():
  for window, sink in VARIANTS:
    for streams in (1, 2):
      mask = masks.history_mask(streams, window, sink)
      assert masks.chunk_table(mask, 7, streams).any(1).all()


def test_dense_repeats_chunks_to_tokens():
  table = np.array([[True, False], [True, True]])
  dense = masks.dense(table, 2, 3)
  expected = [[True] * 3 + [False] * 3] * 2 + [[True] * 6] * 2
  np.testing.assert_array_equal(dense, expected)


def test_masks_are_static_data():
  """Equal masks hash alike, so that a jitted function is traced once."""
  assert masks.history_mask(2, 3, 1) == masks.history_mask(2, 3, 1)
  assert hash(masks.history_mask(2, 3, 1)) == hash(masks.history_mask(2, 3, 1))


@pytest.mark.parametrize(("size", "sink"), [(0, 0), (-1, 0), (2, -1)])
def test_impossible_windows_are_refused(size, sink):
  with pytest.raises(UserError, match=rf"window {size} with sink {sink}"):
    masks.Window(size, sink)
