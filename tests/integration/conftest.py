"""Fixtures of the tests that ask a running API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import serving_bundle as sb
from api_process import Api


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of `serving_bundle`, made once."""
    return sb.build_graphs(tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def start(tmp_path: Path, graphs: Path) -> Iterator[Callable[..., Api]]:
    """Start an API with a bundle (unless bundle=False) and the given LAWNWATCH_* settings."""
    started: list[Api] = []

    def begin(
        *, bundle: bool = True, graph: str = "good", home: Path | None = None, ready: bool = True, **env: str
    ) -> Api:
        api = Api(home or tmp_path / "home", tmp_path / f"log{len(started)}", env)
        if bundle:
            api.point_at(sb.publish(api.store, graphs, graph=graph))
        started.append(api)
        return api.start(ready=ready and (bundle or home is not None))

    yield begin
    for api in started:
        if api.process is not None and api.process.poll() is None:
            api.process.kill()
            api.process.wait()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, graphs: Path) -> Iterator[Api]:
    """One API that the tests share which do not break it."""
    folder = tmp_path_factory.mktemp("api")
    api = Api(folder / "home", folder / "log")
    api.point_at(sb.publish(api.store, graphs))
    api.start()
    yield api
    assert api.stop() == 0, api.log_text()[-3000:]
    assert "Traceback" not in api.log_text(), api.log_text()[-3000:]
