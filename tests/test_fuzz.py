"The judge of `python -m tests.fuzz` on trials whose outcome is known, and a small part of what it tries"

import os
import time
from collections import Counter

import numpy as np
import pytest
from fuzz.__main__ import MAKERS, cases
from fuzz.trial import BAD, Trial, run


def fails(error):
    def _act():
        raise error

    return _act


def say(text, code):
    def _act():
        print(text)
        raise SystemExit(code)

    return _act


KNOWN = [
    ("ok", Trial("", lambda: 5, lambda x: x == 5, "ok")),
    ("refusal", Trial("", fails(ValueError("a.png is broken")), must="refusal", names="a.png")),
    ("silent wrong result", Trial("", lambda: 6, lambda x: x == 5)),
    ("silent wrong result", Trial("", lambda: 5, must="refusal")),
    ("wrong refusal", Trial("", fails(ValueError("a.png is broken")), must="ok")),
    ("wrong place", Trial("", fails(ValueError("line 2 is broken")), names="line 22")),
    ("traceback", Trial("", fails(KeyError("x")))),
    ("unclear error", Trial("", fails(ValueError("one\ntwo")))),
    ("unclear error", Trial("", fails(ValueError("")))),
    ("unclear error", Trial("", fails(OSError("'NoneType' has no len()")))),
    ("unclear error", Trial("", say("\x1b[31m", 0), script=True)),
    ("unclear error", Trial("", say("", 3), script=True)),
    ("ok", Trial("", say("fine", 0), lambda out: out == "fine\n", script=True)),
    ("memory", Trial("", lambda: np.ones(2**25).sum())),
    ("memory", Trial("", lambda: np.ones(2**40))),
    ("hang", Trial("", lambda: time.sleep(60))),
    ("traceback", Trial("", lambda: os._exit(1))),
    ("ok", Trial("", lambda: 5)),
]


@pytest.mark.slow
def test_the_judge_tells_good_outcomes_from_bad_and_no_case_costs_another():
    makers = {str(k): (lambda rng, folder, trial=trial: trial) for k, (_, trial) in enumerate(KNOWN)}
    outcomes = list(run([(room, 0) for room in makers], makers, 0, seconds=6, memory=2**27))
    assert [(o.room, o.verdict) for o in outcomes] == [(str(k), verdict) for k, (verdict, _) in enumerate(KNOWN)]


@pytest.mark.slow
def test_bad_input_gives_the_right_result_or_one_sentence():
    rooms = [room for room in MAKERS if room not in ("train", "pretrained")]
    outcomes = list(run(cases(80, rooms), MAKERS, 0, seconds=60))
    bad = [f"{o.room} {o.number}: {o.verdict}: {o.about}: {o.said}" for o in outcomes if o.verdict in BAD]
    assert not bad, "\n".join(bad)
    counts = Counter(o.verdict for o in outcomes)
    assert min(counts["ok"], counts["refusal"]) > 15 and {o.room for o in outcomes} == set(rooms)


def test_the_same_seed_draws_the_same(tmp_path):
    first, again = ([(o.about, o.verdict) for o in run(cases(20, ["arrays", "tables"]), MAKERS, 3)] for _ in range(2))
    assert first == again
    other = [(o.about, o.verdict) for o in run(cases(20, ["arrays", "tables"]), MAKERS, 4)]
    assert first != other
