# MinIO is published as source only: this builds one pinned version of it.
FROM golang:1.26-bookworm AS build
ARG MINIO_VERSION
ENV CGO_ENABLED=0 GOBIN=/out
RUN go install -trimpath -ldflags "-s -w" "github.com/minio/minio@$MINIO_VERSION" \
 && cp /go/pkg/mod/github.com/minio/minio@$MINIO_VERSION/LICENSE /out/LICENSE

FROM debian:bookworm-slim
RUN echo "minio:x:10001:10001::/data:/usr/sbin/nologin" >> /etc/passwd && echo "minio:x:10001:" >> /etc/group \
 && install -d -o 10001 -g 10001 /data
COPY --from=build /out/minio /usr/local/bin/minio
COPY --from=build /out/LICENSE /usr/share/doc/minio/LICENSE
ARG VERSION=0 COMMIT=unknown MINIO_VERSION
LABEL org.opencontainers.image.title="lawnwatch-minio" \
      org.opencontainers.image.description="MinIO $MINIO_VERSION, built from source" \
      org.opencontainers.image.licenses="AGPL-3.0-only" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
USER 10001:10001
EXPOSE 9000 9001
VOLUME /data
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9000 && printf 'GET /minio/health/live HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3 && read -r _ code _ <&3 && [ \"$code\" = 200 ]"]
ENTRYPOINT ["minio"]
CMD ["server", "/data", "--address=:9000", "--console-address=:9001"]
