// Package image makes images without a container engine: the driver's, and those that the node's Pods need.
package image

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

// Images that are made here only; Release10 has the name of the one in the quick start of the product's release 1.0.
const (
	Pause   = "localhost/pause:1"
	Client  = "localhost/client:1"         // busybox, git and curl
	Upgrade = "localhost/connectors-csi:2" // the driver in another image than deploy.yaml names

	Release10 = "docker-mirrors.alauda.cn/bitnami/git:2.47.1"
)

// Image is one that is made here, of one layer for each platform.
type Image struct {
	Name       string
	entrypoint []string
	files      map[string][]File // by platform, as in linux/amd64
	StopSignal string            // if another one than SIGTERM
}

// HostPlatform is that of this machine.
const HostPlatform = "linux/" + runtime.GOARCH

// New returns an image for this machine.
func New(name string, entrypoint []string, files []File) Image {
	return Image{Name: name, entrypoint: entrypoint, files: map[string][]File{HostPlatform: files}}
}

// File is one entry of an image's only layer. A name that ends with "/" is a directory.
type File struct {
	Name    string
	Mode    int64
	Content []byte
	Link    string // the target, for a symbolic link
}

// Field is a manifest's field image, with the image's name.
var Field = regexp.MustCompile(`(?m)^[ -]*image: *"?([^\s"]+)`)

// NameIn returns the one image that the manifests in a file name.
func NameIn(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var names []string
	for _, match := range Field.FindAllStringSubmatch(string(content), -1) {
		names = append(names, match[1])
	}
	if names = slices.Compact(names); len(names) != 1 {
		return "", fmt.Errorf("%s: exactly one image is expected, it names %q", path, names)
	}
	return names[0], nil
}

// Import hands an image to containerd, in the namespace that Kubernetes uses. A manifest's digest is that of
// another image of this name: here it is one more name, under which kubelet finds this one.
func Import(image Image) error {
	tagged, digest, _ := strings.Cut(image.Name, "@")
	image.Name = tagged
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
func (i Image) archive() ([]byte, error) {
	dir, err := os.MkdirTemp("", machine.Prefix+"image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	name, err := reference.ParseDockerRef(i.Name)
	if err != nil {
		return nil, err
	}
	platforms := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	var legacy []legacyImage
	for _, platform := range slices.Sorted(maps.Keys(i.files)) {
		built, err := i.Build(platform)
		if err != nil {
			return nil, err
		}
		parsed, err := v1.ParsePlatform(platform)
		if err != nil {
			return nil, err
		}
		platforms = mutate.AppendManifests(platforms, mutate.IndexAddendum{Add: built,
			Descriptor: v1.Descriptor{Platform: parsed}})
		manifest, err := built.Manifest()
		if err != nil {
			return nil, err
		}
		if len(legacy) == 0 || platform == HostPlatform { // the older format knows one platform
			legacy = []legacyImage{{blob(manifest.Config), []string{i.Name}, []string{blob(manifest.Layers[0])}}}
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
	return tarOf(dir, File{Name: "manifest.json", Mode: 0o644, Content: text})
}

// legacyImage is an entry of manifest.json, as `docker save` writes it.
type legacyImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// blob is where the layout has it.
func blob(of v1.Descriptor) string { return "blobs/" + of.Digest.Algorithm + "/" + of.Digest.Hex }

// Build makes the image of one platform, of one layer.
func (i Image) Build(platform string) (v1.Image, error) {
	content, err := Tarball(i.files[platform])
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
		Config: v1.Config{Entrypoint: i.entrypoint, Env: []string{"PATH=/usr/bin:/bin"}, StopSignal: i.StopSignal},
		RootFS: v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(image, layer)
}

// tarOf returns the files of a directory and one more.
func tarOf(dir string, more File) ([]byte, error) {
	files := []File{more}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error { // in the order of their names
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		files = append(files, File{Name: path[len(dir)+1:], Mode: 0o644, Content: content})
		return err
	})
	if err != nil {
		return nil, err
	}
	return Tarball(files)
}

// Tarball returns a tar of files, in their order.
func Tarball(files []File) ([]byte, error) {
	var buffer bytes.Buffer
	archive := tar.NewWriter(&buffer)
	for _, f := range files {
		header := &tar.Header{Name: f.Name, Mode: f.Mode, Size: int64(len(f.Content)), Linkname: f.Link}
		switch {
		case f.Link != "":
			header.Typeflag = tar.TypeSymlink
			header.Mode = 0o777
		case strings.HasSuffix(f.Name, "/"):
			header.Typeflag = tar.TypeDir
		}
		if err := archive.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := archive.Write(f.Content); err != nil {
			return nil, err
		}
	}
	err := archive.Close()
	return buffer.Bytes(), err
}
