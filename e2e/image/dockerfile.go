package image

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"connectors-csi/e2e/machine"
)

// The command dockerfile makes sure that the Dockerfile makes the same of the same sources as the command image.

// builder is where the command dockerfile works: with a storage of its own.
type builder struct{ dir string }

func (b builder) buildah(args ...string) (string, error) {
	return machine.Output(append([]string{"buildah", "--storage-driver=vfs", "--root=" + b.dir + "/storage",
		"--runroot=" + b.dir + "/run"}, args...)...)
}

// CheckDockerfile builds the Dockerfile for two platforms and compares what is in the images with what the command
// image puts into its own. No registry is asked: the place of the image golang takes one that has this machine's Go.
func CheckDockerfile() error {
	if err := machine.Install([]machine.Need{
		{"buildah", "buildah", machine.HasCommand("buildah")},
		{"a static busybox", "busybox-static", machine.IsStatic("busybox")},
	}); err != nil {
		return err
	}
	if err := machine.Run("go", "-C", "..", "mod", "download"); err != nil { // no network is needed from here on
		return err
	}
	work, err := os.MkdirTemp("", machine.Prefix+"dockerfile-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	b := builder{work}
	if err := b.makeGolang(); err != nil {
		return err
	}
	for _, arch := range []string{"amd64", "arm64"} {
		const version = "v0.0.0-compared"
		made, err := b.build(arch, version)
		if err != nil {
			return err
		}
		binary := filepath.Join(work, arch)
		if err := BuildDriver("..", binary, arch, version); err != nil {
			return err
		}
		wanted, err := os.ReadFile(binary)
		if err != nil {
			return err
		}
		if !bytes.Equal(made, wanted) {
			return fmt.Errorf("%s: the Dockerfile makes another binary, of %d bytes; the image's has %d", arch, len(made),
				len(wanted))
		}
		fmt.Printf("The Dockerfile makes the same binary for linux/%s as the command image: %d bytes.\n", arch, len(made))
	}
	return nil
}

const (
	policyFile   = "policy.json" // of whose signatures images need
	golangModule = "/modules"    // where the builder sees Go's caches
	golangCache  = "/cache"
)

// makeGolang makes an image with a shell, which the Go of this machine is mounted into.
func (b builder) makeGolang() error {
	rootfs, err := BusyboxFiles()
	if err != nil {
		return err
	}
	archive, err := Tarball(rootfs)
	if err != nil {
		return err
	}
	layer, policy := filepath.Join(b.dir, "busybox.tar"), filepath.Join(b.dir, policyFile)
	if err := errors.Join(os.WriteFile(layer, archive, 0o644),
		os.WriteFile(policy, []byte(`{"default": [{"type": "insecureAcceptAnything"}]}`), 0o644)); err != nil {
		return err
	}
	container, err := b.buildah("from", "--signature-policy="+policy, "scratch")
	if err != nil {
		return err
	}
	for _, step := range [][]string{
		{"add", container, layer, "/"},
		{"config", "--env=PATH=/usr/local/go/bin:/bin", "--env=GOTOOLCHAIN=local", "--env=GOPROXY=off",
			"--env=GOMODCACHE=" + golangModule, "--env=GOCACHE=" + golangCache, container},
		{"commit", "--signature-policy=" + policy, container, "localhost/golang:here"},
	} {
		if _, err := b.buildah(step...); err != nil {
			return err
		}
	}
	return nil
}

// build builds the Dockerfile and returns the binary that it makes. That GO_VERSION names the Go of the image golang
// is the business of whoever builds with that.
func (b builder) build(arch, version string) ([]byte, error) {
	caches, err := machine.Output("go", "env", "GOROOT", "GOMODCACHE", "GOCACHE")
	if err != nil {
		return nil, err
	}
	dirs := strings.Split(caches, "\n")
	if len(dirs) != 3 {
		return nil, fmt.Errorf("go env: %q", caches)
	}
	policy := "--signature-policy=" + filepath.Join(b.dir, policyFile)
	image, err := b.buildah("build", policy, "--isolation=chroot", "--pull-never", "--quiet",
		"--from=localhost/golang:here",
		"--build-arg=TARGETOS=linux", "--build-arg=TARGETARCH="+arch, "--build-arg=VERSION="+version,
		"--volume="+dirs[0]+":/usr/local/go:ro", "--volume="+dirs[1]+":"+golangModule, "--volume="+dirs[2]+":"+golangCache,
		"..")
	if err != nil {
		return nil, err
	}
	container, err := b.buildah("from", policy, "--pull-never", strings.TrimSpace(image))
	if err != nil {
		return nil, err
	}
	root, err := b.buildah("mount", container)
	if err != nil {
		return nil, err
	}
	defer b.buildah("umount", container)
	return os.ReadFile(filepath.Join(root, "connectors-csi"))
}
