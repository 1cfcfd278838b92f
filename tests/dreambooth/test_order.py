from __future__ import annotations

import pytest

from colabtools.dreambooth.order import Order, Slot

SQUARE = [(4, 8, 8)] * 5
MIXED = [(4, 8, 8), (4, 8, 12), (4, 8, 8), (4, 12, 8), (4, 8, 12), (4, 8, 8), (4, 8, 8)]


def rows(order: Order, updates: int) -> list[int]:
    return [slot.row for u in range(updates) for batch in order.batches(u) for slot in batch]


def make(shapes: list[tuple[int, ...]], batch_size: int = 2, passes: int = 1) -> Order:
    return Order("instance", shapes, batch_size=batch_size, batches_per_update=passes, seed=3)


@pytest.mark.parametrize("passes", [1, 3])
def test_every_picture_is_seen_once_before_any_is_seen_again(passes: int) -> None:
    order = make(SQUARE, passes=passes)
    seen = rows(order, 30)
    epochs = [seen[i : i + 5] for i in range(0, len(seen) - 4, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_an_update_does_not_depend_on_those_before_it() -> None:
    straight = make(SQUARE)
    everything = [straight.batches(update) for update in range(40)]
    for update in (39, 7, 23, 0):
        assert make(SQUARE).batches(update) == everything[update]


def test_passes_of_one_update_are_what_separate_updates_would_be() -> None:
    assert rows(make(SQUARE, passes=4), 5) == rows(make(SQUARE), 20)
    assert rows(make(SQUARE, batch_size=4), 10) == rows(make(SQUARE), 20)


def test_places_of_an_update_are_numbered_through() -> None:
    batches = make(SQUARE, passes=2).batches(1)
    assert [slot.number for batch in batches for slot in batch] == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_where_shapes_differ_a_batch_has_one_and_an_epoch_has_each_picture_once(
    batch_size: int,
) -> None:
    order = make(MIXED, batch_size=batch_size)
    seen: list[int] = []
    update = 0
    while len(seen) < 3 * len(MIXED):
        (batch,) = order.batches(update)
        assert len({MIXED[slot.row] for slot in batch}) == 1
        assert 1 <= len(batch) <= batch_size
        seen += [slot.row for slot in batch]
        update += 1
        if len(seen) % len(MIXED) == 0:
            assert sorted(seen[-len(MIXED) :]) == list(range(len(MIXED)))
    assert order.epoch_of(update) == 3


def test_the_epoch_counts_how_often_all_were_seen() -> None:
    assert make(SQUARE, batch_size=4, passes=2).epoch_of(5) == 8


def test_no_pictures_are_no_batches() -> None:
    assert make([]).batches(4) == []


def test_each_place_of_each_update_and_kind_has_its_own_seed() -> None:
    order = make(SQUARE)
    seeds = {
        order.seed_of(stage, update, Slot(kind, 0, number))
        for stage in (1, 2)
        for update in range(5)
        for kind in ("instance", "class")
        for number in range(4)
    }
    assert len(seeds) == 2 * 5 * 2 * 4
    # Which picture stands there does not matter, nor how large the batch is.
    assert order.seed_of(1, 0, Slot("instance", 0, 2)) == order.seed_of(
        1, 0, Slot("instance", 4, 2)
    )
