"""/docs: the API's documentation with a form for every address. All of it comes from here: it works offline."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from lawnwatch.errors import NotFound

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><title>lawnwatch API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui">This page needs JavaScript; <a href="openapi.json">openapi.json</a> does without.</div>
<script src="docs/swagger-ui-bundle.js"></script><script src="docs/start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, displayRequestDuration: true, tryItOutEnabled: true,
  defaultModelsExpandDepth: 0, presets: [SwaggerUIBundle.presets.apis], validatorUrl: null,
});
"""
MEDIA_TYPES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}


def add(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(PAGE)

    @cache
    def document() -> bytes:
        return json.dumps(app.openapi(), ensure_ascii=False, separators=(",", ":")).encode()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(document(), media_type="application/json")

    @app.get("/docs/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name == "start.js":
            return Response(START, media_type="text/javascript")
        if name not in MEDIA_TYPES:
            raise NotFound("The documentation has no such part.", hint="/docs is the whole of it.")
        return Response(_packaged(name), media_type=MEDIA_TYPES[name])


@cache
def _packaged(name: str) -> bytes:
    """A file of Swagger UI, from the package that carries it."""
    return files("fastapi_offline").joinpath("static", name).read_bytes()
