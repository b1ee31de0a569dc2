"""Every registered mixer, in every shape it takes, through the public contract."""

from __future__ import annotations

import pytest

from autocomp.models.mixers import MIXERS
from autocomp.testing.mixer_contract import MixerContract, Seat, seats

ALL = [MIXERS.get(name) for name in MIXERS.names()]


class TestMixers(MixerContract):
    @pytest.fixture(params=seats(*ALL), ids=str)
    def seat(self, request: pytest.FixtureRequest) -> Seat:
        seat: Seat = request.param
        return seat


def test_names_are_those_of_the_registry() -> None:
    assert {name: MIXERS.get(name).name for name in MIXERS} == {name: name for name in MIXERS}
