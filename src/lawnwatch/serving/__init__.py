"""The API: one process, no TensorFlow, a verified model or an honest refusal.

Read in this order: `app` (routes and life), `admission` (who gets in, before a body is read), `uploads` (the
    picture in a body), `watcher` (which model serves), `predictor` (picture to answer), `problems`,
    `metrics`, `server` (uvicorn with timeouts and a clean end).
"""
