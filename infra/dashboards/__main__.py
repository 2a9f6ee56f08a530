"""Writes infra/grafana from the code: `python -m infra.dashboards`. A test holds them equal."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from infra.dashboards import dashboards
from infra.dashboards.provisioning import provisioning

FOLDER = Path(__file__).parents[1] / "grafana"
NOTE = "# Made by `python -m infra.dashboards`: change the code, not this file.\n"


class _Plain(yaml.SafeDumper):
    """No anchors: people read these files."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def written() -> dict[str, str]:
    """Path below infra/grafana -> text."""
    boards = {
        f"dashboards/{name}.json": json.dumps(board, indent=2) + "\n"
        for name, board in dashboards().items()
    }
    files = {
        f"provisioning/{name}": NOTE + yaml.dump(content, Dumper=_Plain, sort_keys=False, width=100)
        for name, content in provisioning().items()
    }
    return boards | files


def main() -> None:
    for name, text in written().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(FOLDER.parents[1]))


if __name__ == "__main__":
    main()
