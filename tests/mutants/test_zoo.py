"""The zoo's short version: every bug still fits its file. `make mutants` lets them loose."""

from pathlib import Path

import pytest

from tests.mutants.zoo import ZOO, Mutant

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("mutant", ZOO, ids=lambda mutant: mutant.name)
def test_every_mutant_fits_its_file(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert (ROOT / mutant.killer.partition("::")[0]).exists()
