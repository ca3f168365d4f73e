# The API: LiteRT and FastAPI, no TensorFlow, no Airflow, no MLflow.
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1 UV_LINK_MODE=copy PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
WORKDIR /build
COPY requirements/serving.txt requirements/build.txt requirements/
# An index of your own comes in as a secret and stays out of every layer.
RUN --mount=type=secret,id=index \
    url=$(cat /run/secrets/index 2>/dev/null || true) && if [ -n "$url" ]; then export PIP_INDEX_URL="$url" UV_DEFAULT_INDEX="$url"; fi \
 && python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements/build.txt \
 && python -m venv --without-pip /opt/venv \
 && /opt/build/bin/uv pip install --python /opt/venv/bin/python --require-hashes -r requirements/serving.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
ARG SOURCE_DATE_EPOCH
# Bytecode that is checked by nothing and holds no time: the root is read-only, and two builds are alike.
RUN /opt/build/bin/python -m hatchling build -t wheel -d dist \
 && /opt/build/bin/uv pip install --python /opt/venv/bin/python --no-deps dist/*.whl \
 && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib \
 && rm -f /opt/venv/.lock

FROM python:3.11-slim-bookworm
RUN rm -rf /usr/local/lib/python3.11/site-packages/* /usr/lib/python3/dist-packages/* /usr/local/bin/pip* /usr/bin/pip* \
 && echo "lawnwatch:x:10001:10001::/var/lib/lawnwatch:/usr/sbin/nologin" >> /etc/passwd \
 && echo "lawnwatch:x:10001:" >> /etc/group \
 && install -d -o 10001 -g 10001 /var/lib/lawnwatch
COPY --from=build /opt/venv /opt/venv
ARG VERSION=0 COMMIT=unknown
LABEL org.opencontainers.image.title="lawnwatch-api" \
      org.opencontainers.image.description="lawnwatch: predictions over HTTP" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LAWNWATCH_HOME=/var/lib/lawnwatch LAWNWATCH_GIT_COMMIT=$COMMIT LAWNWATCH_SERVING__HOST=0.0.0.0
WORKDIR /var/lib/lawnwatch
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["lawnwatch"]
CMD ["serve"]
