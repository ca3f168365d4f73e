# The API: LiteRT and FastAPI, no TensorFlow, no Airflow, no MLflow.

# OpenCV's wheel brings video codecs and OpenBLAS, 150 MB. Built from the same release's source, the modules that prepare
# pictures are a tenth of it and compute the same bytes (tests/e2e/test_container_images.py). Ten minutes, once.
FROM python:3.11-slim-bookworm AS opencv
RUN apt-get update \
 && apt-get install -y --no-install-recommends cmake g++ ninja-build python3-dev \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY requirements/opencv.txt requirements/
# An index of your own comes in as a secret and stays out of every layer.
RUN --mount=type=secret,id=index \
    url=$(cat /run/secrets/index 2>/dev/null || true) && if [ -n "$url" ]; then export PIP_INDEX_URL="$url"; fi \
 && python -m venv /opt/build && /opt/build/bin/pip install --require-hashes -r requirements/opencv.txt
COPY requirements/serving.txt requirements/
RUN --mount=type=secret,id=index \
    url=$(cat /run/secrets/index 2>/dev/null || true) && if [ -n "$url" ]; then export PIP_INDEX_URL="$url"; fi \
 && sed -n '/^opencv-python-headless==/,/[0-9a-f]$/p' requirements/serving.txt > wanted.txt \
 && /opt/build/bin/pip download --no-deps --no-build-isolation --no-binary opencv-python-headless --require-hashes -r wanted.txt \
 && mkdir source && tar -xzf opencv_python_headless-*.tar.gz -C source --strip-components=1
# OpenCV writes into its module when it was built; with a time that is set, two builds are alike.
RUN export SOURCE_DATE_EPOCH=1700000000 \
 && cmake -G Ninja -S source/opencv -B made -DCMAKE_BUILD_TYPE=Release -DBUILD_LIST=core,imgproc,python3 -DBUILD_SHARED_LIBS=OFF \
      -DPYTHON3_EXECUTABLE=/opt/build/bin/python -DPYTHON_DEFAULT_EXECUTABLE=/opt/build/bin/python -DPYTHON3_LIMITED_API=ON \
      -DOPENCV_PYTHON3_INSTALL_PATH=/out -DOPENCV_SKIP_PYTHON_LOADER=ON -DCPU_DISPATCH=AVX2,AVX512_SKX -DBUILD_TESTS=OFF -DBUILD_PERF_TESTS=OFF -DBUILD_opencv_apps=OFF \
      -DBUILD_JAVA=OFF -DWITH_IPP=OFF -DWITH_ITT=OFF -DWITH_OPENCL=OFF -DWITH_LAPACK=OFF -DWITH_EIGEN=OFF -DWITH_PROTOBUF=OFF \
      -DWITH_FLATBUFFERS=OFF -DWITH_ADE=OFF -DWITH_UNIFONT=OFF \
 && cmake --build made --target opencv_python3 \
 && cmake --install made --component python --strip

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
# Gone: OpenCV's wheel but for its name and licences, LiteRT's parts for graphics cards and telephones, and packages' own tests.
RUN cd /opt/venv/lib/python3.11/site-packages \
 && rm -rf cv2 opencv_python_headless.libs ai_edge_litert/libLiteRtWebGpuAccelerator.so ai_edge_litert/tools ai_edge_litert/vendors ai_edge_litert/aot \
      Crypto/SelfTest sqlalchemy/testing \
 && find numpy -type d -name tests -prune -exec rm -rf {} +
# Bytecode that is checked by nothing and holds no time: the root is read-only, and two builds are alike. The packages'
# has no docstrings (and no asserts) under the ordinary name: 5 MiB less; lawnwatch's own docstrings are its --help and /docs.
RUN python -m compileall -q -j 0 -o 2 --invalidation-mode unchecked-hash /opt/venv/lib \
 && find /opt/venv/lib -name '*.opt-2.pyc' -exec sh -c 'for code; do mv "$code" "${code%.opt-2.pyc}.pyc"; done' sh {} +
COPY --from=opencv /out/cv2.abi3.so /opt/venv/lib/python3.11/site-packages/
COPY pyproject.toml README.md LICENSE ./
COPY src src
ARG SOURCE_DATE_EPOCH
RUN /opt/build/bin/python -m hatchling build -t wheel -d dist \
 && /opt/build/bin/uv pip install --python /opt/venv/bin/python --no-deps dist/*.whl \
 && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib/python3.11/site-packages/lawnwatch \
 && sed -i /uv_cache.json/d /opt/venv/lib/python*/site-packages/*.dist-info/RECORD \
 && rm -f /opt/venv/.lock /opt/venv/lib/python*/site-packages/*.dist-info/uv_cache.json

# The base without what a server never reads; copied onto nothing, so that it is gone from the image too.
FROM python:3.11-slim-bookworm AS root
RUN rm -rf /usr/local/lib/python3.11/site-packages/* /usr/lib/python3/dist-packages/* /usr/local/bin/pip* /usr/bin/pip* \
      /usr/share/python-wheels /usr/share/locale/* /usr/share/man/* /usr/share/info/* /usr/share/zoneinfo/right \
      /var/cache/apt/* /var/cache/debconf /var/lib/apt/lists/* /var/lib/dpkg/info /usr/lib/apt /usr/bin/apt* /usr/lib/*/libapt-* \
      /usr/lib/*/gconv /usr/lib/*/perl-base /usr/bin/perl* /usr/share/perl5 \
 && for lib in /usr/lib/python3.11 /usr/local/lib/python3.11; do \
      (cd "$lib" 2>/dev/null && rm -rf ensurepip idlelib lib2to3 pydoc_data test tkinter turtledemo distutils); \
    done; \
    find /usr/share/doc -type f -not -name copyright -delete \
 && echo "lawnwatch:x:10001:10001::/var/lib/lawnwatch:/usr/sbin/nologin" >> /etc/passwd \
 && echo "lawnwatch:x:10001:" >> /etc/group \
 && install -d -o 10001 -g 10001 /var/lib/lawnwatch

FROM scratch
COPY --from=root / /
COPY --from=build /opt/venv /opt/venv
ARG VERSION=0 COMMIT=unknown
LABEL org.opencontainers.image.title="lawnwatch-api" \
      org.opencontainers.image.description="lawnwatch: predictions over HTTP" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LAWNWATCH_HOME=/var/lib/lawnwatch LAWNWATCH_GIT_COMMIT=$COMMIT LAWNWATCH_SERVING__HOST=0.0.0.0
WORKDIR /var/lib/lawnwatch
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ.get(\"LAWNWATCH_SERVING__PORT\", \"8000\")}/health', timeout=4)"]
ENTRYPOINT ["lawnwatch"]
CMD ["serve"]
