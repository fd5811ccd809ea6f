"""What is asked of every kind of source of data and of models: a new one that lacks an answer fails here by name."""

import dataclasses
import importlib
import inspect
import pickle  # noqa: TID251 (Ray sends them that way)
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis.contract.errors import UserError
from fixers import TensorSplit
from orchestrator import subjects
from orchestrator.subjects.architectures import NamedArchitecture
from orchestrator.subjects.catalogue import catalogue
from orchestrator.subjects.onnx.exporting import export_onnx
from orchestrator.subjects.own.data import OwnData
from orchestrator.subjects.own.models import FactoryModel, OnnxModel, WithWeights
from orchestrator.subjects.own.references import Function
from orchestrator.subjects.reading.splits import SplitPlan
from orchestrator.subjects.sources.corruption import CorruptedData, Corruption
from orchestrator.subjects.subject import DataSource, ModelSource, Parity
from orchestrator.subjects.weights import write_state

HERE = Path(__file__).parent


def kinds(method: str, *arguments: str) -> list[type]:
    """The classes of the package that have a method with these arguments, which makes them a source."""

    def is_source(cls: type) -> bool:
        found = getattr(cls, method, None)
        return inspect.isfunction(found) and [*inspect.signature(found).parameters] == ["self", *arguments]

    names = [info.name for info in pkgutil.walk_packages(subjects.__path__, f"{subjects.__name__}.")]
    defined = [
        cls
        for name in names
        for cls in vars(importlib.import_module(name)).values()
        if inspect.isclass(cls) and cls.__module__ == name and not getattr(cls, "_is_protocol", False)
    ]
    return [cls for cls in defined if is_source(cls)]


def lacking(source: object, protocol: type) -> list[str]:
    return sorted(name for name in vars(protocol) if not name.startswith("_") and not hasattr(source, name))


def own_data(folder: Path) -> OwnData:
    return OwnData(folder / "rows.npz", SplitPlan(*[("", 0.25)] * 4))


DATA: dict[type, Callable[[Path], DataSource]] = {
    **{type(definition.data): lambda folder, data=definition.data: data for definition in catalogue().values()},
    OwnData: own_data,
    CorruptedData: lambda folder: CorruptedData(own_data(folder), Corruption("contrast", 1)),
}


@pytest.mark.parametrize("kind", kinds("load", "data_root", "limit"), ids=lambda kind: kind.__name__)
def test_every_kind_of_data_says_what_it_needs(kind: type, tmp_path: Path) -> None:
    assert kind in DATA, f"{kind.__name__} has no example here; add one to DATA"
    source = DATA[kind](tmp_path)
    assert not lacking(source, DataSource), f"{kind.__name__} lacks {lacking(source, DataSource)}; see DataSource"
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301
    assert all(folder.is_absolute() for _, folder in source.modules())
    if isinstance(source.folder, str):
        with pytest.raises(UserError, match=source.folder):
            source.check(tmp_path)
    try:
        source.check(tmp_path)
    except UserError as missing:
        assert str(tmp_path) in str(missing) and "\n" not in str(missing)
        with pytest.raises(UserError):
            source.load(tmp_path, None)
    else:
        assert len(source.load(tmp_path, 40).test) > 0


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def onnx(folder: Path) -> OnnxModel:
    export_onnx(net().eval(), folder / "net.onnx", input_shape=(1, 8, 8))
    return OnnxModel(folder / "net.onnx")


def factory(folder: Path) -> FactoryModel:
    write_state(folder / "given.safetensors", net().state_dict())
    return FactoryModel(Function("test_sources_net", "net", folder), "{}", folder / "given.safetensors")


def with_weights(folder: Path) -> WithWeights:
    write_state(folder / "others.safetensors", net().state_dict())
    return WithWeights(factory(folder), folder / "others.safetensors")


MODELS: dict[type, Callable[[Path], ModelSource]] = {
    NamedArchitecture: lambda folder: NamedArchitecture("LeNet5-8x8", 10),
    OnnxModel: onnx,
    FactoryModel: factory,
    WithWeights: with_weights,
}


@pytest.mark.parametrize("kind", kinds("build"), ids=lambda kind: kind.__name__)
def test_every_kind_of_model_travels(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind in MODELS, f"{kind.__name__} has no example here; add one to MODELS"
    code = f"from torch import nn\n\n\n{inspect.getsource(net)}"
    (tmp_path / "test_sources_net.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    source = MODELS[kind](tmp_path)
    assert not lacking(source, ModelSource), f"{kind.__name__} lacks {lacking(source, ModelSource)}; see ModelSource"
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301
    assert all(folder.is_absolute() for _, folder in source.modules())
    split = TensorSplit(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8))
    assert isinstance(source.parity(split), Parity | None)
    identity, weights = source.identity(), source.build().state_dict()
    (tmp_path / "elsewhere").mkdir()
    paths = {path: Path(shutil.move(path, tmp_path / "elsewhere")) for path in source.files()}
    moved = source.relocated(paths)
    assert [*moved.files()] == [*paths.values()]
    assert moved.modules() == source.modules() and moved.identity() == identity
    if not source.trains:
        assert paths, f"{kind.__name__} has weights, and names no file that they come from"
        assert all(torch.equal(weight, weights[name]) for name, weight in moved.build().state_dict().items())


def test_a_wrapper_answers_what_its_source_does(tmp_path: Path) -> None:
    function = OwnData(Function("factories", "named_parts", HERE), SplitPlan(*[("", 0.25)] * 4))
    for source in (function, own_data(tmp_path), catalogue()["mnist"].data):
        wrapped = CorruptedData(source, Corruption("contrast", 1))
        assert (wrapped.folder, wrapped.modules()) == (source.folder, source.modules())
    assert function.modules() == [("factories", HERE)]


def test_a_source_that_lacks_an_answer_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Careless:
        folder: str = "careless"

        def load(self, data_root: Any, limit: int | None) -> Any: ...

    assert lacking(Careless(), DataSource) == ["check", "modules"]
