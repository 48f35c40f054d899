package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"connectors-csi/e2e/machine"
)

// The command image writes the driver's image, and the command dockerfile makes sure that the Dockerfile makes the
// same of the same sources.

var driverEntrypoint = []string{"/connectors-csi"} // as in the Dockerfile

// driverFiles are those of the driver's image.
func driverFiles(binary string) ([]file, error) {
	content, err := os.ReadFile(binary)
	return []file{{name: "connectors-csi", mode: 0o755, content: content}}, err
}

// driverVersion is the tag that deploy.yaml gives the driver's image.
func driverVersion() (string, error) {
	name, err := imageIn("../deploy.yaml")
	if err != nil {
		return "", err
	}
	_, version, ok := strings.Cut(name[strings.LastIndex(name, "/")+1:], ":")
	if !ok {
		return "", fmt.Errorf("../deploy.yaml: the image %q has no tag", name)
	}
	return version, nil
}

// buildDriver builds a static binary from the driver's sources in a directory, as its Dockerfile does.
func buildDriver(sources, binary, arch, version string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -buildid= -X main.version="+version, "-o", binary, ".")
	cmd.Dir = sources
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build of the driver: %w\n%s", err, out)
	}
	return nil
}

// imageOptions are the flags of the command image.
type imageOptions struct {
	platforms []string
	output    string
}

// parseImageOptions reads the flags, and ends the process if they are wrong.
func parseImageOptions(arguments []string) imageOptions {
	o := imageOptions{platforms: []string{"linux/amd64", "linux/arm64"}}
	flags := flag.NewFlagSet("image", flag.ExitOnError)
	flags.Func("platform", "platforms of the image (default linux/amd64,linux/arm64)", func(value string) error {
		o.platforms = strings.Split(value, ",")
		for _, platform := range o.platforms {
			if arch, ok := strings.CutPrefix(platform, "linux/"); !ok || arch == "" || strings.Contains(arch, "/") {
				return errors.New("a platform is linux/amd64, linux/arm64 or the like")
			}
		}
		return nil
	})
	flags.StringVar(&o.output, "o", "connectors-csi.tar", "write the archive to this file (relative to e2e)")
	flags.Parse(arguments)
	if flags.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "e2e: image takes flags only")
		os.Exit(2)
	}
	return o
}

// bomTool writes what a binary is made of, as CycloneDX.
const bomTool = "github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0"

// writeImage writes the driver's image as an OCI archive, and beside it a bill of materials for each platform.
func writeImage(o imageOptions) error {
	name, err := imageIn("../deploy.yaml")
	if err != nil {
		return err
	}
	version, err := driverVersion()
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", prefix+"image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	driver := image{name: name, entrypoint: driverEntrypoint, files: map[string][]file{}}
	for _, platform := range o.platforms {
		binary := filepath.Join(work, strings.ReplaceAll(platform, "/", "-"))
		if err := buildDriver("..", binary, strings.TrimPrefix(platform, "linux/"), version); err != nil {
			return err
		}
		if driver.files[platform], err = driverFiles(binary); err != nil {
			return err
		}
		bom := filepath.Join(filepath.Dir(o.output), "connectors-csi-"+filepath.Base(binary)+".cdx.json")
		if err := run("go", "run", bomTool, "bin", "-json", "-noserial", "-notimestamp", "-std", "-licenses", "-version", version,
			"-output", bom, binary); err != nil {
			return err
		}
		fmt.Println(bom)
	}
	archive, err := driver.archive()
	if err != nil {
		return err
	}
	if err := os.WriteFile(o.output, archive, 0o644); err != nil {
		return err
	}
	fmt.Printf("%s: %s for %s, %.1f MB\n", o.output, name, strings.Join(o.platforms, " and "), float64(len(archive))/1e6)
	return nil
}

// builder is where the command dockerfile works: with a storage of its own.
type builder struct{ dir string }

func (b builder) buildah(args ...string) (string, error) {
	return output(append([]string{"buildah", "--storage-driver=vfs", "--root=" + b.dir + "/storage", "--runroot=" + b.dir + "/run"}, args...)...)
}

// checkDockerfile builds the Dockerfile for two platforms and compares what is in the images with what the command
// image puts into its own. No registry is asked: the place of the image golang takes one that has this machine's Go.
func checkDockerfile() error {
	if err := machine.Install([]machine.Need{
		{"buildah", "buildah", machine.HasCommand("buildah")},
		{"a static busybox", "busybox-static", isStatic("busybox")},
	}); err != nil {
		return err
	}
	if err := run("go", "-C", "..", "mod", "download"); err != nil { // no network is needed from here on
		return err
	}
	work, err := os.MkdirTemp("", prefix+"dockerfile-")
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
		if err := buildDriver("..", binary, arch, version); err != nil {
			return err
		}
		wanted, err := os.ReadFile(binary)
		if err != nil {
			return err
		}
		if !bytes.Equal(made, wanted) {
			return fmt.Errorf("%s: the Dockerfile makes another binary, of %d bytes; the image's has %d", arch, len(made), len(wanted))
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
	rootfs, err := busyboxFiles()
	if err != nil {
		return err
	}
	archive, err := tarball(rootfs)
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
	caches, err := output("go", "env", "GOROOT", "GOMODCACHE", "GOCACHE")
	if err != nil {
		return nil, err
	}
	dirs := strings.Split(caches, "\n")
	if len(dirs) != 3 {
		return nil, fmt.Errorf("go env: %q", caches)
	}
	policy := "--signature-policy=" + filepath.Join(b.dir, policyFile)
	image, err := b.buildah("build", policy, "--isolation=chroot", "--pull-never", "--quiet", "--from=localhost/golang:here",
		"--build-arg=TARGETOS=linux", "--build-arg=TARGETARCH="+arch, "--build-arg=VERSION="+version,
		"--volume="+dirs[0]+":/usr/local/go:ro", "--volume="+dirs[1]+":"+golangModule, "--volume="+dirs[2]+":"+golangCache, "..")
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
