import tracemalloc

import numpy as np
import pytest

from cmvae.data.plan import EvaluationPlan, TrainingPlan
from cmvae.utils.errors import UserError


def random_cases(count: int):
    rng = np.random.default_rng(7)
    for _ in range(count):
        sizes = rng.integers(1, 40, size=rng.integers(1, 12)).tolist()
        world_size = int(rng.integers(1, 6))
        batch_size = int(rng.integers(1, max(2, sum(sizes) // world_size)))
        yield sizes, world_size, batch_size, int(rng.integers(1, 120))


TRAINING_CASES = [case for case in random_cases(150) if case[1] * case[2] <= sum(case[0])]
# Global batches of several lanes.
TRAINING_CASES += [([97] * 23, 4, 64, 90), ([300, 1, 500, 20, 700], 3, 128, 1000), ([64] * 6, 6, 64, 1)]


def test_there_are_enough_cases():
    assert len(TRAINING_CASES) > 100
    assert {TrainingPlan(c[0], c[1] * c[2]).num_lanes for c in TRAINING_CASES} > {1, 4, 6}


def read_order(plan, epoch):
    """All positions of an epoch in the order of their slots, and the window of each shard."""
    rank = plan.for_rank(epoch)
    order, window_of_shard = [], np.full(len(plan.shard_sizes), -1)
    shard_of = np.repeat(np.arange(len(plan.shard_sizes)), plan.shard_sizes)
    while len(order) < rank.num_batches * plan.global_batch:
        slots, positions = rank.window(len(order))
        assert slots.tolist() == list(range(len(order), len(order) + len(positions)))
        order += positions.tolist()
        shards = np.unique(shard_of[positions])
        assert (window_of_shard[shards] == -1).all(), "no shard is in two windows"
        window_of_shard[shards] = window_of_shard.max() + 1
    return np.array(order), window_of_shard


@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_training_reads_every_sample_once_but_for_less_than_a_global_batch(epoch):
    for sizes, world_size, batch_size, window in TRAINING_CASES:
        plan = TrainingPlan(sizes, world_size * batch_size, seed=3, shuffle_window=window)
        batches = [plan.for_rank(epoch, rank, world_size).positions() for rank in range(world_size)]
        assert {batch.shape for batch in batches} == {(plan.batches_per_epoch, batch_size)}
        read = np.concatenate([batch.ravel() for batch in batches])
        assert len(set(read.tolist())) == len(read)
        assert 0 <= read.min() <= read.max() < sum(sizes)
        assert sum(sizes) - len(read) < world_size * batch_size
        assert set(plan.left_out(epoch).tolist()) == set(range(sum(sizes))) - set(read.tolist())


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    for sizes, world_size, batch_size, window in TRAINING_CASES:
        plan = TrainingPlan(sizes, world_size * batch_size, seed=3, shuffle_window=window)
        parts = [plan.for_rank(2, rank, world_size).positions() for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts, axis=1), plan.for_rank(2).positions())


def test_a_rank_knows_which_samples_of_a_window_it_reads_in_which_batches():
    for sizes, world_size, batch_size, window in TRAINING_CASES:
        plan = TrainingPlan(sizes, world_size * batch_size, seed=3, shuffle_window=window)
        order, _ = read_order(plan, 1)
        slots = np.arange(len(order))
        for rank in {0, world_size - 1}:
            part = plan.for_rank(1, rank, world_size)
            positions = part.positions()
            for numbers in (range(part.num_batches), range(1, part.num_batches, 3)):
                read = [part.batch(number)[0] for number in numbers]
                assert all(part.batch(number)[1].all() for number in numbers)
                expected = np.isin(slots, np.concatenate([[], *read]))
                assert np.array_equal(part.is_read(slots, numbers), expected)
                for number, of_batch in zip(numbers, read, strict=True):
                    assert np.array_equal(order[of_batch], positions[number])


def test_every_sample_is_left_out_equally_often():
    # 10 mod 4 = 2 are left out an epoch: in five epochs each of the ten exactly once.
    plan = TrainingPlan([3, 7], 4, seed=0)
    left_out = np.concatenate([plan.left_out(epoch) for epoch in range(20, 25)])
    assert sorted(left_out.tolist()) == list(range(10))


def test_the_left_out_samples_differ_between_neighbouring_epochs():
    for sizes, world_size, batch_size, window in TRAINING_CASES:
        plan = TrainingPlan(sizes, world_size * batch_size, seed=3, shuffle_window=window)
        if len(plan.left_out(0)):
            assert set(plan.left_out(4).tolist()) != set(plan.left_out(5).tolist())


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return TrainingPlan([50] * 8, 16, seed=seed, shuffle_window=100).for_rank(epoch).positions().tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    # Seeds must not be shifted epochs of each other.
    assert order(1, 2) != order(2, 1)


def test_a_global_batch_is_drawn_from_enough_samples():
    """Each lane has windows of its share; no window could be divided into two that are large enough."""
    for sizes, world_size, batch_size, window in TRAINING_CASES:
        plan = TrainingPlan(sizes, world_size * batch_size, seed=3, shuffle_window=window)
        _, window_of_shard = read_order(plan, 0)
        # A shard whose samples are all left out has no window.
        held = np.bincount(window_of_shard[window_of_shard >= 0], np.array(sizes)[window_of_shard >= 0])
        least = min(-(-window // plan.num_lanes), sum(sizes) - len(plan.left_out(0)))
        assert held.min() >= least - len(plan.left_out(0))
        assert held.max() < 2 * least + 2 * max(sizes) + len(plan.left_out(0))


def test_samples_are_shuffled_within_a_window_and_shards_over_the_epoch():
    order, _ = read_order(TrainingPlan([1000], 1000, seed=0), 0)
    assert (np.diff(order) == 1).mean() < 0.02
    order, window_of_shard = read_order(TrainingPlan([10] * 1000, 10, seed=0, shuffle_window=40), 0)
    assert np.bincount(window_of_shard).tolist() == [4] * 250
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.1


def test_ranks_and_workers_read_separate_shards():
    """Two ranks of a lane each, with four workers."""
    plan = TrainingPlan([64] * 80, 128, seed=0, shuffle_window=128)
    shards = [
        set((plan.for_rank(0, rank, 2).positions()[worker::4] // 64).ravel().tolist())
        for rank in range(2)
        for worker in range(4)
    ]
    assert [len(read) for read in shards] == [10] * 8
    assert len(set().union(*shards)) == 80


def test_a_split_below_one_global_batch_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_size.*read at most 14"):
        TrainingPlan([9, 5], 16)


def test_a_million_shards_are_planned_with_little_memory():
    """No array is as long as the split: 10⁹ samples of one byte each would take more than the limit."""
    tracemalloc.start()
    rank = TrainingPlan(np.full(10**6, 1000), 8192).for_rank(3, 5, 64)
    slots, _ = rank.batch(12345)
    _, positions = rank.window(int(slots[0]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(positions) == 1000
    assert peak < 120e6


def test_evaluation_marks_every_sample_valid_exactly_once():
    for sizes, world_size, batch_size, _ in [*random_cases(150), ([2], 5, 3, 1)]:
        for limit in (None, 1, sum(sizes) // 2 + 1, sum(sizes) + 1):
            plans = [EvaluationPlan(sizes, batch_size, rank, world_size, limit) for rank in range(world_size)]
            assert len({plan.num_batches for plan in plans}) == 1
            ranks = [[plan.batch(number) for number in range(plan.num_batches)] for plan in plans]
            # In the order of ranks and batches the valid samples are the natural order.
            read = [slots[valid] for batches in ranks for slots, valid in batches]
            assert np.concatenate(read).tolist() == list(range(min(limit or sum(sizes), sum(sizes))))
            filled = np.concatenate([slots for batches in ranks for slots, _ in batches])
            assert len(filled) == world_size * plans[0].num_batches * batch_size
            assert 0 <= filled.min() <= filled.max() < sum(sizes)
