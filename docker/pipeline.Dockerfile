# Airflow and every step of the road: TensorFlow, the MLflow client, the DAGs. Each task is a pod of this image.
FROM python:3.11-slim-bookworm AS build
# mysqlclient is published as source only.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev pkg-config libmariadb-dev python3-dev \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1 UV_LINK_MODE=copy PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
# mysqlclient again: without what helps a debugger, which names the folder it was built in, two builds are alike.
ENV CFLAGS=-g0
WORKDIR /build
COPY requirements/cluster.txt requirements/build.txt requirements/
# An index of your own comes in as a secret and stays out of every layer.
RUN --mount=type=secret,id=index \
    url=$(cat /run/secrets/index 2>/dev/null || true) && if [ -n "$url" ]; then export PIP_INDEX_URL="$url" UV_DEFAULT_INDEX="$url"; fi \
 && python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements/build.txt \
 && python -m venv --without-pip /opt/venv \
 && /opt/build/bin/uv pip install --python /opt/venv/bin/python --require-hashes -r requirements/cluster.txt \
 && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib
COPY pyproject.toml README.md LICENSE ./
COPY src src
ARG SOURCE_DATE_EPOCH
RUN /opt/build/bin/python -m hatchling build -t wheel -d dist \
 && /opt/build/bin/uv pip install --python /opt/venv/bin/python --no-deps --target /opt/lawnwatch/lib dist/*.whl \
 && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/lawnwatch/lib \
 && sed -i /uv_cache.json/d /opt/lawnwatch/lib/*.dist-info/RECORD \
 && rm -f /opt/venv/.lock /opt/lawnwatch/lib/.lock /opt/lawnwatch/lib/*.dist-info/uv_cache.json  # says when it was built

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libmariadb3 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
 && rm -rf /usr/local/lib/python3.11/site-packages/* /usr/lib/python3/dist-packages/* /usr/local/bin/pip* /usr/bin/pip* \
 && echo "lawnwatch:x:10001:10001::/var/lib/lawnwatch:/usr/sbin/nologin" >> /etc/passwd \
 && echo "lawnwatch:x:10001:" >> /etc/group \
 && install -d -o 10001 -g 10001 /var/lib/lawnwatch /opt/airflow
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/lawnwatch /opt/lawnwatch
COPY infra/bootstrap_servers.py infra/pools.json /opt/lawnwatch/infra/
COPY dags /opt/lawnwatch/dags
ARG VERSION=0 COMMIT=unknown
LABEL org.opencontainers.image.title="lawnwatch-pipeline" \
      org.opencontainers.image.description="lawnwatch: Airflow and the steps of the pipelines" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
# /opt/lawnwatch/lib holds the package alone, so that a change of code is a layer of a megabyte.
ENV PATH=/opt/venv/bin:/opt/lawnwatch/lib/bin:$PATH PYTHONPATH=/opt/lawnwatch/lib PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LAWNWATCH_HOME=/var/lib/lawnwatch LAWNWATCH_GIT_COMMIT=$COMMIT TF_CPP_MIN_LOG_LEVEL=2 GIT_PYTHON_REFRESH=quiet \
    AIRFLOW_HOME=/opt/airflow AIRFLOW__CORE__DAGS_FOLDER=/opt/lawnwatch/dags AIRFLOW__CORE__LOAD_EXAMPLES=false \
    AIRFLOW__USAGE_DATA_COLLECTION__ENABLED=false MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /var/lib/lawnwatch
USER 10001:10001
# One image, five processes: what runs says how it is asked. A step is healthy while it runs.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s CMD ["python", "-c", "import lawnwatch"]
ENTRYPOINT []
CMD ["lawnwatch", "--help"]
