"""Files of records in given shares: counts of an epoch, turns over epochs, packs and numbers of tokens."""

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.making import example, losses, settings, weights, write_records
from vlparts.training.dataset import Mixture, PackSampler, steps_for_tokens
from vlparts.training.preparation import prepare
from vlparts.training.train import train

FILES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=4)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[list[int]], list[float], int]:
    """Lengths of samples of files, shares in which each file has a sample, and a seed."""
    lengths = draw(FILES)
    total = sum(map(len, lengths))
    shares = draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    shares = [max(share, math.ceil(sum(shares) * 2 / total)) for share in shares]
    return lengths, [float(one) for one in shares], draw(st.integers(0, 2**31))


def counts_by_file(samples: list[int], lengths: list[list[int]]) -> list[int]:
    files = [file for file, ones in enumerate(lengths) for _ in ones]
    found = Counter(files[sample] for sample in samples)
    return [found[file] for file in range(len(lengths))]


def made(lengths: list[list[int]], shares: list[float], seed: int) -> Mixture | None:
    try:
        return Mixture(lengths, shares, seed)
    except ValueError:
        total = sum(map(len, lengths))
        assert min(shares) / sum(shares) * total < 1
        return None


@given(mixtures(), st.integers(0, 100))
def test_an_epoch_has_the_shares(drawn: tuple[list[list[int]], list[float], int], epoch: int) -> None:
    lengths, shares, seed = drawn
    mixture = made(lengths, shares, seed)
    if mixture is None:
        return
    samples = mixture.samples(epoch)
    total = sum(map(len, lengths))
    assert len(samples) == len(mixture.lengths) == total
    for count, share in zip(counts_by_file(samples, lengths), shares, strict=True):
        assert abs(count - Fraction(total) * Fraction(share) / Fraction(sum(shares))) < 1
    tokens = [one for file in lengths for one in file]
    assert all(tokens[sample] <= place for sample, place in zip(samples, mixture.lengths, strict=True))
    assert samples == Mixture(lengths, shares, seed).samples(epoch)


@given(mixtures())
def test_samples_of_a_file_are_used_equally_often(drawn: tuple[list[list[int]], list[float], int]) -> None:
    """In an epoch up to one, and over many epochs up to a few."""
    lengths, shares, seed = drawn
    mixture = made(lengths, shares, seed)
    if mixture is None:
        return
    epochs = 200
    used: Counter[int] = Counter()
    for epoch in range(epochs):
        found = Counter(mixture.samples(epoch))
        first = 0
        for file in lengths:
            times = [found[sample] for sample in range(first, first + len(file))]
            assert max(times) - min(times) <= 1
            first += len(file)
        used.update(found)
    first = 0
    for file in lengths:
        times = [used[sample] for sample in range(first, first + len(file))]
        assert max(times) - min(times) <= 8
        assert min(times) > 0
        first += len(file)


def test_a_share_below_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`data` has a share of 0\.001 of 1\.001 for file 2; expected at least one"):
        Mixture([[1] * 10, [1] * 10], [1.0, 0.001], 0)


@given(mixtures(), st.integers(0, 5))
def test_packs_hold_the_samples_of_an_epoch(drawn: tuple[list[list[int]], list[float], int], epoch: int) -> None:
    lengths, shares, seed = drawn
    mixture = made(lengths, shares, seed)
    if mixture is None:
        return
    tokens = [one for file in lengths for one in file]
    sampler = PackSampler(tokens, 40, 5, seed, mixture=mixture)
    sampler.set_epoch(epoch)
    packs = [*sampler]
    assert len(packs) == len(sampler)
    assert all(sum(tokens[sample] for sample in pack) <= 40 and len(pack) <= 5 for pack in packs)
    assert Counter(sample for pack in packs for sample in pack) == Counter(mixture.samples(epoch))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 300))
def test_steps_are_as_many_as_the_tokens_need(lengths: list[int], per_step: int, tokens: int) -> None:
    sampler = PackSampler(lengths, 30)
    steps = steps_for_tokens(sampler, lengths, per_step, tokens)
    seen = []
    for epoch in range(steps + 1):
        sampler.set_epoch(epoch)
        packs = [sum(lengths[sample] for sample in pack) for pack in sampler]
        seen += [sum(packs[start : start + per_step]) for start in range(0, len(packs), per_step)]
    assert sum(seen[: steps - 1]) < tokens <= sum(seen[:steps])


def test_training_on_several_files(tmp_path: Path) -> None:
    """Twice the same to the bit, images relative to each file, and the number of steps that the tokens need."""
    (tmp_path / "other").mkdir()
    config = settings(tmp_path, count=6, capacity=100, max_tokens=900)
    write_records(tmp_path / "other" / "more.jsonl", [example(index, tmp_path / "other") for index in range(20, 23)])
    data = {tmp_path / "train.jsonl": 1.0, tmp_path / "other" / "more.jsonl": 2.0}
    results = [
        train(config.model_copy(update={"data": data, "output": tmp_path / name})) for name in ("first", "second")
    ]
    assert losses(results[0]) == losses(results[1])
    ours, theirs = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    run = prepare(config.model_copy(update={"data": data}), weights=False)
    sampler = PackSampler(run.data.lengths, 100, seed=0, mixture=run.data.mixture)
    assert results[0].steps == run.args.max_steps == steps_for_tokens(sampler, run.data.lengths, 1, 900)
    counts = counts_by_file(run.data.mixture.samples(0), [[0] * 6, [0] * 3])
    assert counts == [3, 6]
    assert [len(sample) for sample in run.data[[7, 0]]] == [run.data.lengths[7], run.data.lengths[0]]
