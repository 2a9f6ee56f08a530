"""The imports run one way (README, "The house"): read from the source, nothing is executed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "dpdl_core", "infra", "pipelines", "serving")

MAY_IMPORT = {
    "dpdl_core": {"dpdl_core"},
    "infra": {"infra"},
    "pipelines": {"pipelines", "dpdl_core", "infra"},
    "serving": {"serving", "dpdl_core", "infra"},
    "cluster": set(PACKAGES),
}
OUTSIDE_WORLD = {"ray", "kafka", "redis", "minio", "pyarrow", "fastapi", "grafana_client"}
METHOD = {"torch", "torchvision", "timm", "sklearn"}


def imported_roots(source: str) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}: name the package"
            roots.add((node.module or "").split(".")[0])
    return roots


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package):
    for path in modules(package):
        ours = imported_roots(path.read_text()) & set(PACKAGES)
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours}"


def test_the_method_knows_tensors_only():
    for path in modules("dpdl_core"):
        found = imported_roots(path.read_text()) & OUTSIDE_WORLD
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_the_edges_know_nothing_of_the_method():
    for path in modules("infra"):
        found = imported_roots(path.read_text()) & METHOD
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_the_reader_of_imports_sees_them():
    source = "import a.b\nfrom c.d import e\ndef f():\n    import g\n"
    assert imported_roots(source) == {"a", "c", "g"}
