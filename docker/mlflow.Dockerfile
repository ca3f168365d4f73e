# The MLflow server: runs and model versions in MySQL, artifacts handed on to the object store.
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1 UV_LINK_MODE=copy PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
WORKDIR /build
COPY requirements/tracking.txt requirements/build.txt requirements/
# An index of your own comes in as a secret and stays out of every layer.
RUN --mount=type=secret,id=index \
    url=$(cat /run/secrets/index 2>/dev/null || true) && if [ -n "$url" ]; then export PIP_INDEX_URL="$url" UV_DEFAULT_INDEX="$url"; fi \
 && python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements/build.txt \
 && python -m venv --without-pip /opt/venv \
 && /opt/build/bin/uv pip install --python /opt/venv/bin/python --require-hashes -r requirements/tracking.txt \
 && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib \
 && rm -f /opt/venv/.lock

FROM python:3.11-slim-bookworm
RUN rm -rf /usr/local/lib/python3.11/site-packages/* /usr/lib/python3/dist-packages/* /usr/local/bin/pip* /usr/bin/pip* \
 && echo "lawnwatch:x:10001:10001::/tmp:/usr/sbin/nologin" >> /etc/passwd \
 && echo "lawnwatch:x:10001:" >> /etc/group
COPY --from=build /opt/venv /opt/venv
ARG VERSION=0 COMMIT=unknown
LABEL org.opencontainers.image.title="lawnwatch-mlflow" \
      org.opencontainers.image.description="lawnwatch: the MLflow server" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
# A pickled model is code of whoever wrote it: never loaded. The job runner would double the memory.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp GIT_PYTHON_REFRESH=quiet \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /tmp
USER 10001:10001
EXPOSE 5000
HEALTHCHECK --interval=15s --timeout=10s --start-period=300s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health', timeout=8)"]
ENTRYPOINT ["mlflow"]
CMD ["server", "--host=0.0.0.0", "--port=5000", "--workers=1", "--serve-artifacts"]
