# The web app: Streamlit and an HTTP client; it reaches everything through the API.
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1 UV_LINK_MODE=copy PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
WORKDIR /build
COPY requirements/webapp.txt requirements/build.txt requirements/
# An index of your own comes in as a secret and stays out of every layer.
RUN --mount=type=secret,id=index \
    url=$(cat /run/secrets/index 2>/dev/null || true) && if [ -n "$url" ]; then export PIP_INDEX_URL="$url" UV_DEFAULT_INDEX="$url"; fi \
 && python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements/build.txt \
 && python -m venv --without-pip /opt/venv \
 && /opt/build/bin/uv pip install --python /opt/venv/bin/python --require-hashes -r requirements/webapp.txt \
 && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib \
 && rm -f /opt/venv/.lock

FROM python:3.11-slim-bookworm
RUN rm -rf /usr/local/lib/python3.11/site-packages/* /usr/lib/python3/dist-packages/* /usr/local/bin/pip* /usr/bin/pip* \
 && echo "lawnwatch:x:10001:10001::/tmp:/usr/sbin/nologin" >> /etc/passwd \
 && echo "lawnwatch:x:10001:" >> /etc/group
COPY --from=build /opt/venv /opt/venv
COPY webapp /opt/lawnwatch/webapp
ARG VERSION=0 COMMIT=unknown
LABEL org.opencontainers.image.title="lawnwatch-webapp" \
      org.opencontainers.image.description="lawnwatch: the web page" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    STREAMLIT_SERVER_HEADLESS=true STREAMLIT_BROWSER_GATHER_USAGE_STATS=false STREAMLIT_SERVER_FILE_WATCHER_TYPE=none \
    LAWNWATCH_WEBAPP_METRICS_HOST=0.0.0.0
WORKDIR /opt/lawnwatch/webapp
USER 10001:10001
EXPOSE 8501 9106
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
ENTRYPOINT ["python", "serve.py"]
CMD ["--server.port=8501", "--server.address=0.0.0.0"]
