"""The histories that candidates were drawn from are told apart, whatever their internal ids."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest

from recbole_llm.data import eval_phases
from recbole_llm.data.eval_phases import histories_fingerprint
from recbole_llm.data.histories import Histories


def test_the_fingerprint_of_histories_is_that_of_each_user_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    items = [np.empty(0, dtype=np.int64), *(rng.integers(1, 30, size=rng.integers(2, 40)) for _ in range(20))]
    histories = Histories(["[PAD]", *(f"u{user}" for user in range(20))], ["[PAD]", *(f"i{item}" for item in range(29))], items)
    order = list(rng.permutation(np.arange(1, 30)))
    place = np.zeros(30, dtype="<i8")
    place[order] = np.arange(1, 30)
    for phase in ("valid", "test"):
        digest = sha256()
        for user in sorted(range(1, 21), key=histories.user_ids.__getitem__):
            known = np.unique(place[histories.before(user, phase)])
            digest.update(f"{histories.user_ids[user]}\t{place[histories.target(user, phase)]}\t{len(known)}\n".encode())
            digest.update(known.tobytes())
        for number in (2**16, 7):
            monkeypatch.setattr(eval_phases, "_USERS", number)
            assert histories_fingerprint(range(1, 21), histories, phase, order) == digest.hexdigest()
