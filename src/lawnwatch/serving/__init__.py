"""The API: one process, no TensorFlow, a verified model or an honest refusal.

Read in this order: `app` (what it is made of, and its life), then what a request passes: `envelope` (id, headers,
counting), `clients` (who asks, and may they), `intake` (which address takes which body), `admission` (who gets in,
before a body is read), `questions` (how much a client may ask that is no picture), `routes` (the addresses), `uploads`,
`tensors` and `fetching` (the pictures in a request), `answers` (from a picture to what the client is told), `kept`
(what the store keeps, as an answer). Behind them: `api` (what the routes share), `watcher` (which model serves),
`predictor` (picture to answer), `problems`, `schemas`, `openapi`, `metrics`, `server` (uvicorn with timeouts and a
clean end).
"""
