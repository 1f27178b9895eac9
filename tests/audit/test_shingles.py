"""Which texts are near, against a comparison of all with all."""

import random

import numpy as np

from megapsft.audit.shingles import Contained, jaccard, near_pairs, numbers, shingles

WORDS = [f"w{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(20)]


def text(rng, length):
    return " ".join(rng.choice(WORDS) for _ in range(length))


def test_a_shingle_is_five_words_and_signs_whatever_their_blanks():
    assert len(shingles("a b c d e f")) == 2
    assert np.array_equal(shingles("A  b,\nc d"), shingles("a B, c d"))
    assert not np.intersect1d(shingles("3 + 4 = 7 ."), shingles("3 - 4 = 7 .")).size
    assert len(shingles("two words")) == 1
    assert len(shingles("  ")) == 0


def test_jaccard():
    one, other = shingles("a b c d e f g"), shingles("b c d e f g h")
    assert jaccard(one, one) == 1
    assert jaccard(one, other) == 2 / 4


def test_numbers():
    assert numbers("1,000 apples, 2.5 each, 1000 in all") == {"1000": 2, "2.5": 1}


def test_near_texts_are_those_that_comparing_all_would_find():
    rng = random.Random(0)
    texts = [text(rng, 80) for _ in range(300)]
    for number in range(0, 100, 2):  # each changed in one word, or in more
        own = texts[number].split()
        for place in rng.sample(range(80), rng.choice([1, 1, 2, 5])):
            own[place] = rng.choice(WORDS)
        texts[200 + number] = " ".join(own)
    sets = [shingles(one) for one in texts]
    wanted = {(a, b) for a in range(300) for b in range(a) if jaccard(sets[a], sets[b]) >= 0.8}
    found = list(near_pairs(texts, [""] * 300, 0.8))
    assert 20 < len(wanted) < 50
    assert {(later, earlier) for later, earlier, _ in found} == wanted
    assert all(index == jaccard(sets[later], sets[earlier]) for later, earlier, index in found)


def test_texts_that_ask_with_other_numbers_are_not_compared():
    same = text(random.Random(1), 60)
    assert [pair[:2] for pair in near_pairs([same] * 3, ["with 2", "with 3", "and 3"], 0.8)] == [(2, 1)]


def test_what_is_contained():
    rng = random.Random(2)
    problems = [text(rng, 30) for _ in range(5)]
    index = Contained(problems)
    assert index.most(f"Please: {problems[3]} Thank you.") == (3, 1.0)
    assert index.most(" ".join(problems[3].split()[:15])) == (3, 11 / 26)
    assert index.most("nothing of all this is known") is None
    assert Contained(["there are 3 of " + problems[0]]).most("there are 4 of " + problems[0]) is None
