"""Planting faults: a copy of a module with one piece of its source changed."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Callable[[ModuleType, str, str], ModuleType]]:
    """plant(module, old, new): the module with `old`, which must stand there once, made `new`."""
    planted: list[str] = []

    def plant_fault(module: ModuleType, old: str, new: str) -> ModuleType:
        source = Path(str(module.__file__)).read_text()
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module}"
        path = tmp_path / f"faulty_{len(planted)}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        faulty = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = faulty  # dataclasses look their module up
        planted.append(path.stem)
        spec.loader.exec_module(faulty)
        return faulty

    yield plant_fault
    for name in planted:
        del sys.modules[name]
