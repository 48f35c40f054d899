# syntax=docker/dockerfile:1
# Builds on the builder's own platform for whichever platform is asked for:
#   docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=v0.1.0 -t connectors-csi:v0.1.0 .
ARG GO_VERSION=1.26
FROM --platform=$BUILDPLATFORM golang:${GO_VERSION} AS build
ARG TARGETOS TARGETARCH VERSION=dev
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY main.go csi.go kube.go render.go mount.go ./
# The same sources and Go release give the same bytes, wherever they are built.
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -buildvcs=false -ldflags "-s -w -buildid= -X main.version=$VERSION" -o /connectors-csi .

FROM scratch
COPY --from=build /connectors-csi /connectors-csi
ENTRYPOINT ["/connectors-csi"]
