"""Hub models by both exporters of torch come in whole: every weight, any batch, and torch.fx can cut them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BENCHMARK = Path(__file__).parents[4] / "benchmarks" / "onnx_reach.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("onnx_reach", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["onnx_reach"] = module
    spec.loader.exec_module(module)
    return module


reach = _load()


@pytest.mark.parametrize("exporter", reach.EXPORTERS)
@pytest.mark.parametrize(("library", "name"), [(library, name) for library in reach.HUB for name in reach.HUB[library]])
def test_hub_model(tmp_path: Path, library: str, name: str, exporter: str) -> None:
    pytest.importorskip(library)
    model = reach.hub_model(library, name)
    reach.export(model, tmp_path / "m.onnx", exporter, 256 if "256" in name else 224)
    _, outcome, reader, difference, _ = reach.attempt(tmp_path / "m.onnx", model)
    # Exporters store the position tables of some models gathered, as other weights or as constants.
    has_tables = "swin" in name or "levit" in name
    assert outcome == "loads" or (has_tables and outcome.startswith("loads, but "))
    assert reader == "fixstudy"
    assert float(difference) < 1e-4
