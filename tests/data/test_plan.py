import numpy as np
import pytest

from cmvae.data.plan import EvaluationPlan, TrainingPlan, WorldSizeChange
from cmvae.utils.errors import UserError


def random_cases(count: int):
    rng = np.random.default_rng(7)
    for _ in range(count):
        sizes = rng.integers(1, 40, size=rng.integers(1, 12)).tolist()
        world_size = int(rng.integers(1, 6))
        batch_size = int(rng.integers(1, max(2, sum(sizes) // world_size)))
        yield sizes, world_size, batch_size, int(rng.integers(1, 120))


TRAINING_CASES = [case for case in random_cases(150) if case[1] * case[2] <= sum(case[0])]


def test_there_are_enough_cases():
    assert len(TRAINING_CASES) > 100


@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_training_reads_every_sample_once_but_for_less_than_a_global_batch(epoch):
    for sizes, world_size, batch_size, window in TRAINING_CASES:
        plan = TrainingPlan(sizes, batch_size, world_size, seed=3, shuffle_window=window)
        ranks = [plan.for_rank(epoch, rank) for rank in range(world_size)]
        assert {rank.batches.shape for rank in ranks} == {(plan.batches_per_epoch, batch_size)}
        assert all(rank.valid.all() for rank in ranks)
        read = np.concatenate([rank.batches.ravel() for rank in ranks])
        assert len(set(read.tolist())) == len(read)
        assert 0 <= read.min() <= read.max() < sum(sizes)
        assert sum(sizes) - len(read) < world_size * batch_size
        assert set(plan.left_out(epoch).tolist()) == set(range(sum(sizes))) - set(read.tolist())


def test_every_sample_is_left_out_equally_often():
    # 10 mod 4 = 2 are left out an epoch: in five epochs each of the ten exactly once.
    plan = TrainingPlan([3, 7], batch_size=2, world_size=2, seed=0)
    left_out = np.concatenate([plan.left_out(epoch) for epoch in range(20, 25)])
    assert sorted(left_out.tolist()) == list(range(10))


def test_the_left_out_samples_differ_between_neighbouring_epochs():
    for sizes, world_size, batch_size, window in TRAINING_CASES:
        plan = TrainingPlan(sizes, batch_size, world_size, seed=3, shuffle_window=window)
        if len(plan.left_out(0)):
            assert set(plan.left_out(4).tolist()) != set(plan.left_out(5).tolist())


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return TrainingPlan([50] * 8, 16, seed=seed, shuffle_window=100).for_rank(epoch, 0).batches.tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    # Seeds must not be shifted epochs of each other.
    assert order(1, 2) != order(2, 1)


def test_windows_hold_enough_samples_and_the_order_goes_window_by_window():
    for sizes, world_size, batch_size, window in TRAINING_CASES:
        plan = TrainingPlan(sizes, batch_size, world_size, seed=3, shuffle_window=window)
        order, window_of_shard = plan.order(0)
        held = np.bincount(window_of_shard, weights=sizes)
        assert held.min() >= min(window, sum(sizes))
        assert (np.diff(np.repeat(window_of_shard, sizes)[order]) >= 0).all()


def test_samples_are_shuffled_within_a_window():
    order, _ = TrainingPlan([1000], 1000, seed=0).order(0)
    assert (np.diff(order) == 1).mean() < 0.02


def test_four_workers_of_a_rank_read_separate_stretches():
    plan = TrainingPlan([10] * 40, batch_size=5, seed=0, shuffle_window=10)
    order, _ = plan.order(0)
    place = {position: i for i, position in enumerate(order.tolist())}
    batches = plan.for_rank(0, 0).batches
    stretches = [sorted(place[p] for p in batches[worker::4].ravel().tolist()) for worker in range(4)]
    assert stretches == [list(range(100 * i, 100 * (i + 1))) for i in range(4)]


def test_a_split_below_one_global_batch_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_size.*at most 7"):
        TrainingPlan([9, 5], batch_size=8, world_size=2)
    with pytest.raises(UserError, match="fewer ranks"):
        TrainingPlan([2], batch_size=1, world_size=3)


def test_evaluation_marks_every_sample_valid_exactly_once():
    for sizes, world_size, batch_size, _ in [*random_cases(150), ([2], 5, 3, 1)]:
        plan = EvaluationPlan(sizes, batch_size, world_size)
        ranks = [plan.for_rank(0, rank) for rank in range(world_size)]
        assert {rank.batches.shape for rank in ranks} == {(plan.batches_per_epoch, batch_size)}
        # In the order of ranks and batches the valid samples are the natural order.
        read = np.concatenate([rank.batches[rank.valid] for rank in ranks])
        assert read.tolist() == list(range(sum(sizes)))
        for limit in (1, sum(sizes) // 2 + 1, sum(sizes) + 1):
            limited = EvaluationPlan(sizes, batch_size, world_size, limit)
            parts = [limited.for_rank(0, rank) for rank in range(world_size)]
            assert {part.batches.shape for part in parts} == {(limited.batches_per_epoch, batch_size)}
            read = np.concatenate([part.batches[part.valid] for part in parts])
            assert read.tolist() == list(range(min(limit, sum(sizes))))
        filled = np.concatenate([rank.batches.ravel() for rank in ranks])
        assert 0 <= filled.min() <= filled.max() < sum(sizes)


def consumed(plan, epoch, first, last):
    """Positions of the batches first to last − 1, of all ranks, (last − first, W·B)."""
    ranks = [plan.for_rank(epoch, rank) for rank in range(plan.world_size)]
    return np.concatenate([rank.batches[first:last] for rank in ranks], axis=1)


def test_what_ranks_left_of_an_epoch_is_dealt_to_ranks_of_another_number():
    """Four ranks leave after two batches, one after three more, and two finish the epoch."""
    sizes, epoch = [40, 7, 30, 19, 24], 3

    def plan(world_size, *world_size_changes):
        return TrainingPlan(
            sizes,
            12 // world_size,
            world_size,
            seed=5,
            shuffle_window=30,
            world_size_changes=world_size_changes,
        )

    first, second = (
        WorldSizeChange(epoch, batch=2, world_size=4),
        WorldSizeChange(epoch, batch=5, world_size=1),
    )
    parts = [
        consumed(plan(4), epoch, 0, 2),
        consumed(plan(1, first), epoch, 2, 5),
        consumed(plan(2, first, second), epoch, 5, None),
    ]
    read = np.concatenate(parts)
    assert read.shape == (10, 12)
    assert sorted(read.ravel().tolist()) == sorted(plan(2).order(epoch)[0].tolist())
    # Ranks that stop on the way and come back in the same number read on in the same order.
    again = plan(2, first, second)
    assert np.array_equal(consumed(again, epoch, 7, None), parts[2][2:])
    for other in (epoch - 1, epoch + 1):
        assert np.array_equal(consumed(again, other, 0, None), consumed(plan(2), other, 0, None))
