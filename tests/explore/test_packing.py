"""Maps come back from the bytes of a page as the page's script reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cameo.explore.packing import BUDGET, Kept, Pack, choose_kept
from tests.helpers.explored import unpacked


def random_maps(queries: int, keys: int, seed: int) -> torch.Tensor:
    logits = torch.randn(queries, keys, generator=torch.Generator().manual_seed(seed))
    return (4 * logits).softmax(-1)


def test_whole_maps_come_back() -> None:
    pack = Pack(Kept(None, 1))
    maps = [random_maps(15, 21, 0), random_maps(15, 20, 1)]  # an odd number of bytes, then another map
    for number, of_map in enumerate(maps):
        pack.add(of_map, (3, 5), query=number)
    assert [record["query"] for record in pack.records] == [0, 1]
    for of_map, record in zip(maps, pack.records, strict=True):
        best, peak, shares = unpacked(pack, record, *of_map.shape)
        assert best.tolist() == of_map.argmax(-1).tolist()
        np.testing.assert_allclose(peak, of_map.amax(-1), atol=0.5 / 65535 + 1e-7)
        # Half a step of the square root, of 255: at a share of the largest one the error is at most this.
        np.testing.assert_allclose(
            np.sqrt(shares / peak[:, None]), (of_map / of_map.amax(-1, keepdim=True)).sqrt(), atol=0.51 / 255
        )


def test_the_largest_shares_of_some_queries() -> None:
    pack = Pack(Kept(4, 2))
    whole = random_maps(20, 30, 2)  # a grid of 4 x 5 tokens, of which rows 0, 2 and columns 0, 2, 4 are kept
    pack.add(whole, (4, 5))
    tokens = [0, 2, 4, 10, 12, 14]
    best, _, shares = unpacked(pack, pack.records[0], 6, 30)
    assert best.tolist() == whole[tokens].argmax(-1).tolist()
    top = whole[tokens].topk(4)
    for row in range(6):
        assert sorted(np.flatnonzero(shares[row])) == sorted(top.indices[row].tolist())
        np.testing.assert_allclose(shares[row][top.indices[row]], top.values[row], rtol=0.02, atol=2e-3)


def test_ties_and_rows_without_attention() -> None:
    pack = Pack(Kept(None, 1))
    pack.add(torch.tensor([[0.5, 0.5], [0.0, 0.0]]), (1, 2))
    best, peak, shares = unpacked(pack, pack.records[0], 2, 2)
    assert best.tolist() == [0, 0]
    assert peak[1] == 0
    assert shares[0, 0] == shares[0, 1]
    assert shares[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(64, 64)] * 432, Kept(None, 1)), ([(1024, 1024)] * (16 * 12 * 2), Kept(20, 1))],
)
def test_what_is_kept_fits_into_the_budget(sizes: list[tuple[int, int]], expected: Kept) -> None:
    kept = choose_kept(sizes)
    assert kept == expected
    assert sum(kept.size(*size) for size in sizes) <= BUDGET


def test_very_many_queries_are_thinned() -> None:
    kept = choose_kept([(4096, 4096)] * 200)
    assert kept.step == 2
    assert kept.told().endswith("keys per query, every 2nd row and column of query tokens")
    assert sum(kept.size(4096, 4096) for _ in range(200)) <= BUDGET
