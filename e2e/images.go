package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/distribution/reference"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	tarballs "github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"connectors-csi/e2e/machine"
)

// The node reaches no registry. Every image that a test needs is written here, as an OCI archive, and imported under
// the name by which manifests refer to it. The driver's is the one that the command image writes.

const (
	pauseImage   = "localhost/pause:1"
	clientImage  = "localhost/client:1"         // busybox, git and curl
	upgradeImage = "localhost/connectors-csi:2" // the driver in another image than deploy.yaml names
)

// image is one that is made here, of one layer for each platform.
type image struct {
	name       string
	entrypoint []string
	files      map[string][]file // by platform, as in linux/amd64
	stopSignal string            // if another one than SIGTERM
}

// hostPlatform is that of this machine.
const hostPlatform = "linux/" + runtime.GOARCH

// here returns an image for this machine.
func here(name string, entrypoint []string, files []file) image {
	return image{name: name, entrypoint: entrypoint, files: map[string][]file{hostPlatform: files}}
}

// file is one entry of an image's only layer. A name that ends with "/" is a directory.
type file struct {
	name    string
	mode    int64
	content []byte
	link    string // the target, for a symbolic link
}

var imageField = regexp.MustCompile(`(?m)^[ -]*image: *"?([^\s"]+)`)

// imageIn returns the one image that the manifests in a file name.
func imageIn(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var names []string
	for _, match := range imageField.FindAllStringSubmatch(string(content), -1) {
		names = append(names, match[1])
	}
	if names = slices.Compact(names); len(names) != 1 {
		return "", fmt.Errorf("%s: exactly one image is expected, it names %q", path, names)
	}
	return names[0], nil
}

// importImage hands an image to containerd, in the namespace that Kubernetes uses. A manifest's digest is that of
// another image of this name: here it is one more name, under which kubelet finds this one.
func importImage(image image) error {
	tagged, digest, _ := strings.Cut(image.name, "@")
	image.name = tagged
	archive, err := image.archive()
	if err != nil {
		return err
	}
	cmd := exec.Command("ctr", "-n", "k8s.io", "images", "import", "-")
	cmd.Stdin = bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ctr images import: %w: %s", err, out)
	}
	if digest == "" {
		return nil
	}
	name, err := reference.ParseDockerRef(tagged)
	if err != nil {
		return err
	}
	return machine.Run("ctr", "-n", "k8s.io", "images", "tag", name.String(), name.Name()+"@"+digest)
}

// archive returns the image as a tar of an OCI image layout, with what `docker load` of an older engine looks for. The
// same files give the same bytes.
// https://github.com/opencontainers/image-spec/blob/main/image-layout.md
func (i image) archive() ([]byte, error) {
	dir, err := os.MkdirTemp("", machine.Prefix+"image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	name, err := reference.ParseDockerRef(i.name)
	if err != nil {
		return nil, err
	}
	platforms := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	var legacy []legacyImage
	for _, platform := range slices.Sorted(maps.Keys(i.files)) {
		built, err := i.build(platform)
		if err != nil {
			return nil, err
		}
		parsed, err := v1.ParsePlatform(platform)
		if err != nil {
			return nil, err
		}
		platforms = mutate.AppendManifests(platforms, mutate.IndexAddendum{Add: built, Descriptor: v1.Descriptor{Platform: parsed}})
		manifest, err := built.Manifest()
		if err != nil {
			return nil, err
		}
		if len(legacy) == 0 || platform == hostPlatform { // the older format knows one platform
			legacy = []legacyImage{{blob(manifest.Config), []string{i.name}, []string{blob(manifest.Layers[0])}}}
		}
	}
	written, err := layout.Write(dir, empty.Index)
	if err != nil {
		return nil, err
	}
	if err := written.AppendIndex(platforms, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          name.String(),
		"org.opencontainers.image.ref.name": name.(reference.Tagged).Tag(),
	})); err != nil {
		return nil, err
	}
	text, err := json.Marshal(legacy)
	if err != nil {
		return nil, err
	}
	return tarOf(dir, file{name: "manifest.json", mode: 0o644, content: text})
}

// legacyImage is an entry of manifest.json, as `docker save` writes it.
type legacyImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// blob is where the layout has it.
func blob(of v1.Descriptor) string { return "blobs/" + of.Digest.Algorithm + "/" + of.Digest.Hex }

// build makes the image of one platform, of one layer.
func (i image) build(platform string) (v1.Image, error) {
	content, err := tarball(i.files[platform])
	if err != nil {
		return nil, err
	}
	opener := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }
	layer, err := tarballs.LayerFromOpener(opener, tarballs.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	os, arch, _ := strings.Cut(platform, "/")
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: os, Architecture: arch,
		Config: v1.Config{Entrypoint: i.entrypoint, Env: []string{"PATH=/usr/bin:/bin"}, StopSignal: i.stopSignal},
		RootFS: v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(image, layer)
}

// tarOf returns the files of a directory and one more.
func tarOf(dir string, more file) ([]byte, error) {
	files := []file{more}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error { // in the order of their names
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		files = append(files, file{name: path[len(dir)+1:], mode: 0o644, content: content})
		return err
	})
	if err != nil {
		return nil, err
	}
	return tarball(files)
}

// tarball returns a tar of files, in their order.
func tarball(files []file) ([]byte, error) {
	var buffer bytes.Buffer
	archive := tar.NewWriter(&buffer)
	for _, f := range files {
		header := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.content)), Linkname: f.link}
		switch {
		case f.link != "":
			header.Typeflag = tar.TypeSymlink
			header.Mode = 0o777
		case strings.HasSuffix(f.name, "/"):
			header.Typeflag = tar.TypeDir
		}
		if err := archive.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := archive.Write(f.content); err != nil {
			return nil, err
		}
	}
	err := archive.Close()
	return buffer.Bytes(), err
}
