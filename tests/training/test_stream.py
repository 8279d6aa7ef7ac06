"""The order of images does not depend on how it is cut."""

import itertools

from dtem_hf.training.feed import ImageStream


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def test_every_epoch_is_a_permutation_and_epochs_differ():
    stream = flat(ImageStream(num_images=10, batch_size=3, first=0, last=10, seed=1))
    epochs = [[i for epoch, i in stream if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_cut_anywhere_it_goes_on_as_it_would_have():
    whole = flat(ImageStream(7, 4, 0, 12, seed=3))
    assert flat(ImageStream(7, 4, 5, 12, seed=3)) == whole[20:]
    assert flat(ImageStream(7, 2, 0, 24, seed=3)) == whole
    assert flat(ImageStream(7, 4, 0, 12, seed=4)) != whole
