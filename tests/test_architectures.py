"""Every network of `architectures.py` is capable of everything, or an error says of which module it is not.

`make zoo` runs all networks, `make test` a few.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from architectures import ARCHITECTURES, QUICK, REFUSED
from sweep import PROPERTIES, Subject

from lrcompress.types import CompressionError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*samples cannot span"),  # two small batches, on purpose
]

LIBRARIES = ("torch", "timm", "torchvision", "transformers")
NETWORKS = [
    pytest.param(a, id=str(a), marks=() if a.name in QUICK else pytest.mark.zoo) for a in ARCHITECTURES
]


@pytest.fixture(scope="session")
def found(request):
    """Collect what each network is capable of: joins the file of ``--architectures-json``, if it is given."""
    cells: dict[str, dict[str, str]] = {}
    yield cells
    path = request.config.getoption("--architectures-json")
    if path is None:
        return
    path = Path(path)
    earlier = json.loads(path.read_text())["networks"] if path.exists() else {}
    names = [str(architecture) for architecture in ARCHITECTURES]
    joined = {name: earlier.get(name, {}) | cells.get(name, {}) for name in names}
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    path.write_text(json.dumps({"versions": versions, "networks": joined}, indent=1) + "\n")


@pytest.fixture(scope="module", params=NETWORKS)
def subject(request, tmp_path_factory):
    subject = Subject(request.param, tmp_path_factory.mktemp("saved") / "artefact")
    assert subject.model is not None  # or skips
    return subject


@pytest.mark.parametrize("name", PROPERTIES)
def test_every_network_is_capable_of_everything(subject, name, found):
    cells = found.setdefault(str(subject.architecture), {})
    refused = REFUSED.get((subject.architecture.name, name))
    if refused is None:
        try:
            cells[name] = PROPERTIES[name](subject)
        except Exception as error:
            cells[name] = f"fails: {(str(error) or repr(error)).splitlines()[0]}"
            raise
        return
    cells[name] = "fails: not refused as expected"
    with pytest.raises(CompressionError, match=refused) as error:
        PROPERTIES[name](subject)
    cells[name] = f"refused: {error.value}"


def test_enough_networks_of_all_libraries():
    assert len(ARCHITECTURES) >= 40
    assert len({str(architecture) for architecture in ARCHITECTURES}) == len(ARCHITECTURES)
    assert set(QUICK) | {name for name, _ in REFUSED} <= {architecture.name for architecture in ARCHITECTURES}
    assert {name for _, name in REFUSED} <= set(PROPERTIES)
    assert len(QUICK) == 8
    assert {architecture.library for architecture in ARCHITECTURES} == set(LIBRARIES) - {"torch"}
