"""The local place: a pointer in the object store, which the running API follows without a restart."""

from __future__ import annotations

import time
from collections.abc import Callable

from lawnwatch import bundle
from lawnwatch.release_target import TARGET_KEY, ReleaseTarget, read_target
from lawnwatch.rollout.driver import Driver, Progress

POLL_SECONDS = 0.25
TIMEOUT_SECONDS = 60.0


class LocalRollout(Driver):
    """Moves the pointer in the store and watches `GET {api_url}/model/info` until the API confirms it."""

    def _read(self) -> ReleaseTarget | None:
        return read_target(self._store)

    def _write(self, target: ReleaseTarget | None) -> None:
        if target is None:
            self._store.delete(TARGET_KEY)
        else:
            self._store.put(TARGET_KEY, target.to_bytes(), content_type="application/json")

    def _fault(
        self, release: bundle.Bundle, timeout: float | None, tick: Callable[[], None], progress: Progress
    ) -> str:
        timeout = TIMEOUT_SECONDS if timeout is None else timeout
        deadline = time.monotonic() + timeout
        said = ""
        while True:
            serving = self._ask()
            if serving.proves(release.sha256):
                return ""
            if refusal := serving.rejects(release.sha256):
                return f"the API refused it: {refusal}"
            why = serving.reason or "the API has not loaded it yet"
            if why != said:
                progress(f"waiting for the API: {why}")
                said = why
            if time.monotonic() >= deadline:
                return f"no confirmation within {timeout:.0f} s ({why})"
            tick()
            time.sleep(POLL_SECONDS)
